#!/usr/bin/env bash
# A real Slurm cluster of two nodes on this machine, for tests: controller, two node daemons, munge.
#
#   tests/cluster.sh install     Debian's packages, where this is a container and we are root
#   tests/cluster.sh up DIR      start; state, configuration and logs in DIR; then: export SLURM_CONF=DIR/slurm.conf
#   tests/cluster.sh down DIR    cancel the jobs and stop what `up` started
#
# HS_CLUSTER: ports (below) or none, to try the tests without a cluster.
# As root a node has a network namespace of its own (its own host name, address, loopback and ports, no way out), as on a real
# cluster; otherwise, or with HS_CLUSTER=ports, both nodes share this host's. The partition `urgent` preempts `batch`, whose jobs
# are told so by their --signal and requeued after 120 s. Needs Slurm with multiple-slurmd, as Debian builds it.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
nodes=(node1 node2)

fail() {
    echo "cluster.sh: $1" >&2
    exit 1
}

install() {
    if command -v slurmctld >/dev/null && command -v ip >/dev/null; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || [ -d /run/systemd/system ]; then
        fail "slurmctld is missing and this isn't a container of ours: apt-get install --no-install-recommends slurm-wlm iproute2"
    fi
    local policy=/usr/sbin/policy-rc.d ours=
    # Keeps the packages from starting their own daemons.
    if [ ! -e $policy ]; then ours=1 && printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy; fi
    export DEBIAN_FRONTEND=noninteractive
    local code=0
    local apt=(apt-get -q -y -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20)
    { "${apt[@]}" install --no-install-recommends slurm-wlm iproute2 ||
        { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends slurm-wlm iproute2; }; } >&2 || code=$?
    if [ -n "$ours" ]; then rm -f $policy; fi
    [ "$code" = 0 ] || fail "apt-get couldn't install slurm-wlm"
}

# Namespaces ------------------------------------------------------------------------------------------------------------

can_have_namespaces() {
    [ "${HS_CLUSTER:-}" != ports ] && [ "$(id -u)" = 0 ] && command -v ip >/dev/null || return 1
    ip netns add "$tag-try" 2>/dev/null || return 1
    local code=0
    nsenter --net="/run/netns/$tag-try" unshare --uts --mount --propagation private true 2>/dev/null || code=1
    ip netns del "$tag-try"
    return "$code"
}

add_namespace() { # name, last byte of its address
    ip netns add "$tag-$1"
    ip link add "$tag-$1" type veth peer name eth0 netns "$tag-$1"
    ip link set "$tag-$1" master "$tag-br" up
    ip -n "$tag-$1" addr add "$net.$2/24" dev eth0
    ip -n "$tag-$1" link set lo up
    ip -n "$tag-$1" link set eth0 up
}

make_network() {
    ip link add "$tag-br" type bridge
    ip addr add "$net.1/24" dev "$tag-br"
    ip link set "$tag-br" up
    add_namespace ctl 2
    add_namespace node1 11
    add_namespace node2 12
    # The v4-mapped lines: torch looks its peers up by such addresses and waits for the resolver otherwise.
    printf '%s\n' "127.0.0.1 localhost" "$net.1 login" "$net.2 ctl" "$net.11 node1" "$net.12 node2" \
        "::ffff:$net.11 node1-mapped" "::ffff:$net.12 node2-mapped" >"$dir/hosts"
}

# Not `ip netns exec`: it remounts /sys, and slurmd finds no cgroup directory there.
# shellcheck disable=SC2016
inside='hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs -o size=1g,mode=1777 shm /dev/shm; shift 2; exec "$@"'
on() { # node, command...
    local node=$1
    shift
    if [ "$mode" = namespaces ]; then
        nsenter --net="/run/netns/$tag-$node" unshare --uts --mount --propagation private -- bash -c "$inside" _ "$node" "$dir" "$@"
    else
        "$@"
    fi
}

# Configuration ---------------------------------------------------------------------------------------------------------

write_configuration() {
    local controller="ctl($net.2)" node1="NodeHostname=node1 NodeAddr=$net.11" node2="NodeHostname=node2 NodeAddr=$net.12"
    if [ "$mode" = ports ]; then
        controller="$(hostname -s)(127.0.0.1)"
        node1="NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 1))"
        node2="NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 2))"
        echo "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" >"$dir/slurm.conf"
    else
        echo "SlurmdPort=$((port + 1))" >"$dir/slurm.conf"
    fi
    # cred_expire: how long a requeued job waits; 5 is the least, and a start that takes longer fails. FirstJobId: logs of an
    # earlier cluster aren't taken for ours. MinJobAge: ended jobs stay known. preempt_send_user_signal: --signal is sent at a
    # preemption too. Time limits: this machine may be slow, or stand still for a while.
    cat >>"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$controller
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
KillWait=20
MinJobAge=3600
FirstJobId=$(($(date +%s) % 900000 + 1000))
ReturnToService=2
CompleteWait=0
InactiveLimit=0
TCPTimeout=20
MessageTimeout=100
BatchStartTimeout=300
UnkillableStepTimeout=600
AccountingStorageType=accounting_storage/none
NodeName=node1 $node1 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN
NodeName=node2 $node2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=01:00:00 DefaultTime=00:10:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=01:00:00 DefaultTime=00:10:00 PriorityTier=100 PreemptMode=OFF
CONF
    echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf" # else slurmd looks for one, and fails where there is none
}

# Up and down -----------------------------------------------------------------------------------------------------------

idle_nodes() {
    timeout 20 sinfo -h -N -p batch -o %T 2>/dev/null | grep -cx idle || true
}

up() {
    [ "${HS_CLUSTER:-}" != none ] || fail "HS_CLUSTER=none"
    for program in slurmctld slurmd munged sbatch; do
        command -v $program >/dev/null || fail "$program is missing: tests/cluster.sh install"
    done
    if [ -e "$dir/tag" ]; then down; fi # what a killed session left
    mkdir -p "$dir/state" "$dir/spool-node1" "$dir/spool-node2"
    chmod 755 "$dir"
    tag=hs$(($$ % 100000)) net=198.$((18 + $$ % 2)).$(($$ / 2 % 250)) port=$((12000 + $$ % 2000 * 3)) mode=ports
    if can_have_namespaces; then mode=namespaces; fi
    echo "$tag" >"$dir/tag"
    trap 'if [ $? != 0 ]; then tail -n 5 "$dir"/*.log >&2; "$0" down "$dir"; fi' EXIT
    if [ "$mode" = namespaces ]; then make_network; fi
    write_configuration
    export SLURM_CONF=$dir/slurm.conf
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key" && chmod 400 "$dir/munge.key")
    munged --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
        --seed-file="$dir/munged.seed" || fail "munged doesn't start"
    on ctl slurmctld -c >"$dir/slurmctld.out" 2>&1 || fail "slurmctld doesn't start: $(tail -n 3 "$dir/slurmctld.out")"
    for node in "${nodes[@]}"; do
        on "$node" slurmd -N "$node" >"$dir/slurmd-$node.out" 2>&1 || fail "slurmd doesn't start: $(tail -n 3 "$dir/slurmd-$node.out")"
    done
    for _ in $(seq 450); do
        if [ "$(idle_nodes)" = ${#nodes[@]} ]; then
            echo "$mode"
            return
        fi
        sleep 0.2
    done
    fail "the nodes aren't idle after 90 s"
}

ours() { # pid: one of our daemons, and alive
    tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | grep -qx "SLURM_CONF=$dir/slurm.conf"
}

stop() { # pid files: end their processes, where they are ours
    local pids=() pid
    for file in "$@"; do
        if pid=$(cat "$file" 2>/dev/null) && ours "$pid"; then pids+=("$pid"); fi
    done
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for _ in $(seq 100); do
        for pid in "${pids[@]}"; do
            if ours "$pid"; then sleep 0.1 && continue 2; fi
        done
        return 0
    done
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
}

down() {
    export SLURM_CONF=$dir/slurm.conf
    if [ -e "$dir/slurmctld.pid" ]; then
        timeout 5 scancel --user="$(id -u)" 2>/dev/null || true
        for _ in $(seq 100); do
            [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    stop "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"
    tag=$(cat "$dir/tag" 2>/dev/null) || return 0
    command -v ip >/dev/null || return 0
    for namespace in $(ip netns list 2>/dev/null | awk '{print $1}' | grep "^$tag-" || true); do ip netns del "$namespace"; done
    ip link del "$tag-br" 2>/dev/null || true
    rm -f "$dir/tag"
}

action=${1:-} dir=${2:-}
case $action in
install) install ;;
up | down)
    [ -n "$dir" ] || fail "usage: tests/cluster.sh up|down DIR"
    mkdir -p "$dir"
    dir=$(cd "$dir" && pwd -P)
    "$action"
    ;;
*) fail "usage: tests/cluster.sh install | up DIR | down DIR" ;;
esac
