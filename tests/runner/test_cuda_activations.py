"""expert_activations: prefill with less exact inputs of the routed experts, and nothing else changed."""

from pathlib import Path

import numpy as np
import pytest
from cuda_script import GENERATE, GREEDY_OPTIONS, Gpu, prompt

LOGITS = """
tokens, kind, path = arguments
engine = core.Engine(program, None, kind)
session = engine.open_session()
session.keep_logits(True)
logits = []
session.run(engine, tokens, GREEDY)  # a prefill
logits.append(session.logits().copy())
session.reset()
for token in tokens[:5]:
    session.run(engine, [token], GREEDY)
    logits.append(session.logits().copy())
np.save(path, np.stack(logits))
show(None)
"""


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# Of the logits; a layer's own error is about a tenth of it.
@pytest.mark.parametrize(("kind", "largest"), [("int8", 0.1), ("float8", 0.3)])
def test_prefill_alone_is_less_exact(
    gpu: Gpu, program: Path, tmp_path: Path, kind: str, largest: float
) -> None:
    files = {name: tmp_path / f"{name}.npy" for name in ("bfloat16", kind)}
    for name, file in files.items():
        gpu.run(program, LOGITS, prompt(12), name, str(file))
    exact, rounded = (np.load(file) for file in files.values())
    error = relative(rounded[0], exact[0])
    print(f"{kind}: logits of a prefill {error:.4f} from bfloat16's")
    assert 0 < error < largest
    np.testing.assert_array_equal(rounded[1:], exact[1:])


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_the_same_answer_twice(gpu: Gpu, program: Path, kind: str) -> None:
    script = GENERATE.replace("arguments[1])", "None, arguments[1])")
    first, again = (gpu.run(program, script, prompt(37), kind, GREEDY_OPTIONS) for _ in range(2))
    assert first == again
    assert len(first[0]) == GREEDY_OPTIONS["max_new_tokens"]


REFUSED = """
try:
    core.Engine(program, None, arguments[0])
except (RuntimeError, ValueError) as error:
    show(str(error))
else:
    show(None)
"""


def test_an_unknown_type_is_refused(gpu: Gpu, program: Path) -> None:
    message = gpu.run(program, REFUSED, "int3")
    assert '"int3": it must be bfloat16, int8 or float8' in message
