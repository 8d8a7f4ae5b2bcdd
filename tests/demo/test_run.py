"""The run of the demo, and what it says at its end."""

from __future__ import annotations

from tests.example_runs import record
from trl_trustkl.demo.run import Options, closing


def test_the_closing_paragraph_says_what_the_records_say():
    options = Options(kl_target=6.0, cliprange=0.2)
    done = [record(i, binding="anchor" if i > 2 else "clip") for i in range(1, 10)]
    text = " ".join(closing(options, done).split())
    assert "averaged 5.6 nats per response (target 6)" in text
    assert "removed 25% of the gradient's weight" in text and "0.030 nats per token on average" in text
    assert "ratio was 9.5, outside [0.8, 1.2]" in text and "the anchor (7 of 9 updates)" in text
    calm = [record(trust=record().trust._replace(max_ratio=1.1), binding="none")]
    assert "within [0.8, 1.2]" in closing(options, calm).replace("\n", " ")
    assert "none of them" in closing(options, calm).replace("\n", " ")
