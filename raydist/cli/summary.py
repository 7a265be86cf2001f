"""A run's folder in one dictionary: what `raydist ls` and `raydist status` print."""

from __future__ import annotations

from typing import Any

from raydist.folder import RunFolder
from raydist.places import shown
from raydist.redact import redact
from raydist.track.ettr import effective_time
from raydist.track.records import evaluations, gained_and_forgotten, phase_seconds, read_metrics, supersede
from raydist.track.silence import silence_now


def summary(folder: RunFolder) -> dict[str, Any]:
    """`step` of `steps`, `tokens` trained on and `loss` are the newest on record; None before the first."""
    recorded, status = read_metrics(folder), folder.status()
    records = supersede(recorded)
    step = next((r for r in reversed(records) if r["kind"] == "train"), {})
    begun = [r for r in recorded if r["kind"] in ("start", "resume")]
    effective = effective_time(recorded)
    return {
        "name": folder.path.resolve().name,
        "state": folder.state(),
        "since": status.get("since"),
        "error": redact(status["error"]) if "error" in status else None,
        "driver": folder.driver() or None,
        "silence": silence_now(folder) if folder.state() == "training" else None,
        "step": step.get("step"),
        "steps": begun[-1].get("steps") if begun else None,
        "tokens": step.get("tokens_seen"),
        "skipped_steps": step.get("skipped_steps"),
        "loss": step.get("loss"),
        "perplexity": {
            name: {"first": of[0]["perplexity"], "last": of[-1]["perplexity"]}
            for name, of in evaluations(records).items()
        },
        **gained_and_forgotten(records),
        "tokens_per_second": step.get("tokens_per_second"),
        "mfu": step.get("mfu"),
        "seconds": phase_seconds(recorded),
        "effective_training_time": effective.to_json() if effective else None,
        "attempts": len(begun),
        "workers": begun[-1].get("world_size") if begun else None,
        "attention": begun[-1].get("attention") if begun else None,
        "checkpoints": folder.committed_steps(),
        "folder": shown(folder.path),
        "model": shown(folder.model) if folder.has_model else None,
        "report": shown(folder.report) if folder.report.exists() else None,
    }
