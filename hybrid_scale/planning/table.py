"""Plans as tables, for a terminal or as Markdown for a paper's appendix: memory line by line with what each line is.

Chooses and computes nothing.
"""

from collections.abc import Sequence

from hybrid_scale.planning.costs import STAGING_LINE
from hybrid_scale.planning.forecast import RunPlan, gib

MEANING = {
    "4-bit weights": "half a byte a weight of the linear layers, a rank's share",
    "quantisation state (replicated)": "a byte a 64 weights, 4 a 16,384; ZeRO doesn't share it out",
    "frozen weights": "embedding table, norms, biases (without NF4 all weights), a rank's share",
    "trained weights": "float32, and the optimiser's float32 copy of them, a rank's shares",
    "gradients": "float32, a rank's share",
    "Adam moments": "two in float32, a rank's share",
    "adapters kept whole": "small tensors that ZeRO-3 doesn't let go",
    "second copy, over the shard group": "hpZ: gathers stay inside the group",
    STAGING_LINE: "on their way from host memory; what the worse of two published runs needed",
    "ZeRO-3 live weights": "gathered at once: stage3_max_live_parameters",
    "ZeRO-3 prefetch": "gathered ahead: stage3_prefetch_bucket_size",
    "embedding table, gathered alone": "what of it exceeds the two lines above",
    "gradient buckets": "two of reduce_bucket_size, float32",
    "dequantised weight": "the largest linear layer in 16 bits",
    "activations": "inputs of the layers of kept tokens, one layer's inside of a micro-batch",
    "gathered embeddings": "of all texts of the global batch, and their gradients",
    "loss": "copies of a pool, a chunk of scores (loss.max_logits)",
    "allocator (reserved over allocated)": "12 % of the lines above, as answer.ai measured",
    "CUDA and NCCL": "context and buffers of a process, assumed",
    "saved by kept graphs": "training.offload_activations: tokens kept x inputs of the layers",
}
"""What a line of memory is, by its name (`costs.memory_lines`, `costs.host_lines`)."""
UNCHECKPOINTED = "what all layers of kept tokens save for the backward pass"

Rows = Sequence[Sequence[str]]


def table(rows: Rows, markdown: bool = False, texts: Sequence[int] = (0,)) -> str:
    """Rows under a head; columns whose numbers are in `texts` to the left, all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [
        [
            cell.ljust(width) if column in texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    rule = ["-" * width if column in texts else "-" * (width - 1) + ":" for column, width in enumerate(max(w, 3) for w in widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))


def facts(lines: dict[str, str], markdown: bool = False) -> str:
    """Key and value, a line each."""
    if markdown:
        return table([("", ""), *lines.items()], True, (0, 1))
    return "\n".join(f"  {key:<22}{value}" for key, value in lines.items())


def memory_table(plans: Sequence[tuple[str, RunPlan]], markdown: bool = False) -> str:
    """GiB of one GPU by line, a column a plan; for one plan what each line is."""
    fullest = sorted((plan.lines for _, plan in plans), key=len, reverse=True)
    names = list(dict.fromkeys(name for lines in fullest for name in lines))
    rows = [("memory of a GPU, GiB", *(title for title, _ in plans))]
    rows += [(name, *(_number(plan.lines.get(name)) for _, plan in plans)) for name in names]
    rows.append(("total", *(_number(plan.memory) for _, plan in plans)))
    rows.append(("usable", *(_number(plan.limit) for _, plan in plans)))
    if len(plans) > 1:
        return table(rows, markdown)
    plan = plans[0][1]
    means = ["", *(_meaning(name, plan) for name in names), "", f"97 % of {gib(plan.cluster.gpu.memory)}"]
    return table([(*row, what) for row, what in zip(rows, means, strict=True)], markdown, (0, 2))


def host_table(plan: RunPlan, markdown: bool = False) -> str:
    """GiB of a node's host memory by line."""
    rows = [
        ("host memory of a node, GiB", "", ""),
        *((name, _number(size), _meaning(name, plan)) for name, size in plan.host.items()),
    ]
    return table([*rows, ("total", _number(sum(plan.host.values())), "")], markdown, (0, 2))


def _meaning(name: str, plan: RunPlan) -> str:
    if name == "activations" and not plan.config.model.gradient_checkpointing:
        return UNCHECKPOINTED
    return MEANING[name]


def _number(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def seconds(value: float) -> str:
    """Two decimals, or two digits of what is shorter than a tenth of a second."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def weights(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"
