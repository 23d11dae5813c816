"""Peak memory of a training step stays below the logits, one kind of mechanism at a time."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from mst_fx.measure import MALLOC_ENV

SCRIPT = """
    import json, torch
    import torch.nn.functional as F
    from torch import nn
    from mst_fx.measure import peak_over_start
    T, H, V = 2048, 32, 4096
    head, teacher = nn.Linear(H, V), nn.Linear(H, V).requires_grad_(False)
    x, labels = torch.randn(2, T // 2, H, requires_grad=True), torch.randint(0, V, (2, T // 2))

    def ce(logits):
        return F.cross_entropy(logits.reshape(-1, V), labels[:, : logits.shape[1]].reshape(-1))

    def several_losses_and_metrics():
        logits = head(x)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        loss = ce(logits) + 1e-3 * logits.logsumexp(-1).square().mean() + 1e-4 * logits.square().mean()
        return loss, accuracy, logits

    def distillation():
        student, target = F.log_softmax(head(x) / 2, -1), F.softmax(teacher(x).detach() / 2, -1)
        return F.kl_div(student, target, reduction="batchmean"),

    def mean_per_sequence():
        per_token = F.cross_entropy(head(x).transpose(1, 2), labels, reduction="none")
        return (per_token.sum(1) / (labels > 5).sum(1)).mean(),

    def preference():
        logp = head(x).log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(1)
        return -F.logsigmoid(logp[0] - logp[1]),

    def sliced_and_returned():
        logits = head(x)
        return ce(logits[:, :-1]), logits

    found = {}
    for fn in (several_losses_and_metrics, distillation, mean_per_sequence, preference, sliced_and_returned):
        compiled = torch.compile(fn, backend="mst", options={"mst.compiler": "aot_eager"})
        compiled()[0].backward()
        peaks = []
        for f in (fn, compiled):
            x.grad = None
            head.zero_grad()
            peaks.append(peak_over_start(lambda: f()[0].backward(), "cpu")[0] / (T * V * 4))
        found[fn.__name__] = peaks
    print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_below_the_logits() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT)],
        capture_output=True, text=True, env={**os.environ, **MALLOC_ENV}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (plain, ours) in json.loads(done.stdout.splitlines()[-1]).items():
        assert plain > 2, name
        assert ours < 1, f"{name}: {ours:.2f} times the logits, plain {plain:.2f}"
