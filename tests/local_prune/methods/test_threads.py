"""Numbers stay right in a process where another library has called `torch.set_num_threads`, which breaks torch's
batched LU.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# In a process of its own, as the call spoils it. References are numpy's, in float64.
SOLVES = """
import torch
torch.set_num_threads(2)
import numpy as np
from local_prune.methods import apt
from local_prune.methods import bonsai
from local_prune.methods import obs as structured

generator = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(*shape, generator=generator)

def hessian(size):
    X = normal(2 * size, size)
    return X.T @ X / len(X) + 0.01 * torch.eye(size)

def order(H, G, width):
    inverse, names, gone = np.linalg.inv(H), list(range(len(H) // width)), []
    while len(names) > 1:
        rows = [np.r_[name * width : (name + 1) * width] for name in names]
        left = np.concatenate(rows)
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        W = inverse @ G[left]
        parts = [slice(i * width, (i + 1) * width) for i in range(len(names))]
        gone.append(names.pop(int(np.argmin([np.sum(W[p] * np.linalg.solve(inverse[p, p], W[p])) for p in parts]))))
    return gone

# SmolLM2's KV groups and query heads, and wider ones
for members, width, outputs in ((3, 192, 576), (9, 64, 576), (4, 256, 64)):
    H, W = hessian(members * width), normal(members * width, outputs)
    G, exact = H @ W, order(H.double().numpy(), (H.double() @ W.double()).numpy(), width)
    found = structured.removal_order(torch.cholesky_inverse(torch.linalg.cholesky(H)), G, width, members - 1)
    assert found.tolist() == exact, (width, found.tolist(), exact)
    (kept, weight), = structured.solve_levels(H, G, found, [1], width)
    rows = np.r_[int(kept) * width : (int(kept) + 1) * width]
    reference = np.linalg.solve(H.double().numpy()[np.ix_(rows, rows)], G.double().numpy()[rows])
    assert np.allclose(weight.numpy(), reference, rtol=1e-3, atol=1e-3), width

size = 320
U, W = torch.linalg.cholesky(hessian(size), upper=True), normal(size, 4)
removed = torch.rand(size, 4, generator=generator) < 0.7  # systems of about 224 unknowns
errors, A = apt.joint_errors(W, U, removed).numpy(), (U.double().T @ U.double()).numpy()
for one in range(4):
    P = removed[:, one].numpy()
    z = np.zeros(size)
    z[P] = np.linalg.solve(A[np.ix_(P, P)], W[P, one].double().numpy())
    assert np.allclose(errors[:, one], U.double().numpy() @ z, rtol=1e-3, atol=1e-3), one

signs, prior, y = normal(300, 500).sign().double(), torch.rand(500, generator=generator).double(), normal(300).double()
S, r = signs.numpy(), prior.numpy()
e = S @ r
c = max(0.0, e @ y.numpy() / (e @ e))
A = (S * r) @ (S * r).T
A += 0.1 * np.trace(A) / len(A) * np.eye(len(A))
expected = r * (c + (S * r).T @ np.linalg.solve(A, y.numpy() - c * e))
assert np.allclose(bonsai.ridge(signs, y, prior, 0.1).numpy(), expected)
print("right")
"""


def test_solves_are_right_after_set_num_threads() -> None:
    process = subprocess.run([sys.executable, "-c", SOLVES], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.stdout == "right\n", process.stdout + process.stderr


def test_nothing_is_solved_by_torchs_lu() -> None:
    """It is wrong for batches only, and only then; but whoever calls it will not have that in mind."""
    lu = re.compile(
        r"torch\.linalg\.(solve|solve_ex|tensorsolve|inv|inv_ex|tensorinv|det|slogdet|lu\w*)\(|torch\.(lu|inverse|pinverse|det)"
    )
    method = re.compile(r"\.(inverse|pinverse|logdet|det|lu_solve)\(\)")
    files = [path for package in ("supernet", "local_prune", "search") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 50
    assert not [path.name for path in files if lu.search(path.read_text()) or method.search(path.read_text())]
