from typing import Any

from raydist.job.load import build_job
from raydist.sweep.trial import Evaluations


def evaluation(step: int, source: str, bits: float, n_bytes: int) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "source": source, "bits_per_byte": bits, "n_bytes": n_bytes}


def test_a_step_that_was_evaluated_is_one_result_over_all_sources_by_their_bytes(capfd: Any) -> None:
    job = build_job(
        {
            "name": "t",
            "model": {"base": "b"},
            "corpus": {"sources": {"web": {"path": "t.txt"}}},
            "packing": {"block_size": 64},
            "train": {"max_steps": 20, "global_batch_size": 4},
        }
    )
    results: list[dict[str, Any]] = []
    with Evaluations(job, results.append) as heard:
        heard.phase("training")
        heard.message("a worker was lost")
        for record in (
            {"kind": "start", "step": 0, "steps": 20},
            evaluation(5, "web", 2.0, 300),
            evaluation(5, "books", 1.0, 100),
            {"kind": "train", "step": 6},
            evaluation(20, "web", 1.5, 300),
        ):
            heard.record(record)
        assert results == [{"bits_per_byte": 1.75, "percent": 25.0, "tokens": 5 * 4 * 64}]
        heard.flush()
    assert results[1] == {"bits_per_byte": 1.5, "percent": 100.0, "tokens": 20 * 4 * 64}
    assert capfd.readouterr() == ("", "")
