"""launch/train.py with one place made slow: python slow_train.py PLACE SECONDS STEP [what launch/train.py takes].

PLACE: `loading` (of the model), `step` (the first micro-batch of step STEP), `evaluation`, `save` (the writing of a checkpoint,
and the step that goes on meanwhile), or `nowhere`. Rank 0 alone is slow, so that the other waits for it in a collective. It says
`slow: PLACE` when it gets there.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from hybrid_scale.signals import LISTENER, NOTICE, REQUESTS  # noqa: E402

LISTENER.start((*REQUESTS, NOTICE))

from hybrid_scale import dist  # noqa: E402
from hybrid_scale.train import checkpoint, loop, run  # noqa: E402
from launch import train  # noqa: E402

WRITE_SECONDS = 6.0


def slowly(place: str, seconds: float, call: Callable[..., Any], due: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        if dist.rank() == 0 and due():
            print(f"slow: {place}", file=sys.stderr, flush=True)
            time.sleep(seconds)
        return call(*given, **named)

    return slow


def main() -> int:
    place, seconds, step = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    at: list[int] = []

    def watching(one_step: Callable[..., Any]) -> Callable[..., Any]:
        def noted(trainer: loop.Trainer, number: int) -> Any:
            at[:] = [number + 1]
            return one_step(trainer, number)

        return noted

    loop.Trainer._one_step = watching(loop.Trainer._one_step)  # type: ignore[method-assign]
    if place == "loading":
        run.load_embedder = slowly(place, seconds, run.load_embedder)
    if place == "evaluation":
        train.evaluate = slowly(place, seconds, train.evaluate)
    if place == "save":
        checkpoint.write = slowly(place, WRITE_SECONDS, checkpoint.write)
    if place in ("step", "save"):
        embed = run.make_engine

        def slow_engine(*given: Any) -> Any:
            engine = embed(*given)
            name = "step" if place == "step" else "step after"
            engine.embed = slowly(name, seconds, engine.embed, lambda: at == [step])  # type: ignore[method-assign]
            return engine

        run.make_engine = slow_engine
    sys.argv = ["train.py", *sys.argv[4:]]
    return train.main()


if __name__ == "__main__":
    train.leave(main())
