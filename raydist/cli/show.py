"""What the commands print: a plan, the token logs, and the summary that ends a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydist.errors import RaydistError
from raydist.places import shown

if TYPE_CHECKING:
    from raydist.run.run import RunResult
    from raydist.run.step_text import Sample
    from raydist.run.verify import Verified
    from raydist.sweep.sweep import SweepResult


def as_json(value: Any) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())


def checked(paths: Sequence[str], load: Callable[[str], object]) -> None:
    """Load every file and say which are valid. Exits with the status of the last error."""
    code = 0
    for path in paths:
        try:
            load(path)
            click.echo(f"{path}: valid")
        except RaydistError as error:
            code = error.exit_code
            click.secho(f"{path}: {error}", fg="red", err=True)
    if code:
        raise SystemExit(code)


MICRO_BATCH_FROM = {
    "job": "",
    "earlier attempts": " (found by earlier attempts)",
    "first guess, halved if memory runs out": " (a first guess, halved if memory runs out)",
    "first guess": " (a first guess: on a GPU the largest that fits is found before the first step)",
}


def planned(plan: dict[str, Any]) -> None:
    from raydist.track.humanize import duration, size, workers

    click.echo(f"job {plan['name']}")
    for name, source in plan["data"]["sources"].items():
        click.echo(
            f"  {name}: {source['files']:,} files, {size(source['file_bytes'])},"
            f" {source['slices']:,} slices;"
            f" about {source['documents']:,} documents, {source['tokens']:,} tokens; log {source['log']};"
            f" {source['epochs']:.3g} epochs;"
            f" {source['mean_tokens']:,.1f} tokens and {source['mean_words']:,.1f} words a document,"
            f" {source['unique_share']:.2%} of those looked at are unique"
        )
        _not_used(source.get("left_out", {}))
    steps, parameters = plan["steps"], plan["parameters"]
    click.echo(
        f"  tokenizer {plan['data']['tokenizer']}{_begins(plan)}; about {plan['data']['blocks']:,} blocks\n"
        f"  {steps['optimizer_steps']:,} steps of {steps['tokens_per_step']:,} tokens{_stages(steps)}"
        f" on {steps['workers']} workers:"
        f" {steps['accumulation_steps']} micro batches of {steps['micro_batch_size']} sequences each"
        f"{MICRO_BATCH_FROM[steps['micro_batch_from']]}\n"
        f"  {parameters['total']:,} parameters, {parameters['trainable']:,} of them trained"
        f"{_frozen(parameters)}\n"
        f"  memory per worker: {_parts(plan['memory_per_worker_bytes'])}"
    )
    if least := plan.get("least"):
        click.echo(
            f"  on {workers(least['workers'])}, the least: {least['accumulation_steps']} micro batches of"
            f" {least['micro_batch_size']} sequences each; memory per worker:"
            f" {_parts(least['memory_per_worker_bytes'])}"
        )
    click.echo(f"  disk: {_parts(plan['disk_bytes'])}")
    if measured := plan.get("measured"):
        click.echo(
            f"  measured here: {measured['seconds_per_step']:,.2f} s a step, {duration(measured['seconds'])}"
            f" without evaluations and checkpoints; {size(measured['memory_bytes'])} of memory"
        )


def _frozen(parameters: dict[str, Any]) -> str:
    """What is left as it is of a multimodal model, and of a mixture whose experts are quantized."""
    text = ""
    if others := parameters["frozen"]:
        text += f"; {', '.join(others)} frozen, since no text passes through"
    if experts := parameters["without_adapter"]:
        text += f"; no adapter on the quantized experts of {len(experts)} layers"
    return text


def sample(shown: Sample) -> None:
    """A line for the sample and for each of its documents, and their text."""
    click.secho(f"sample {shown.number:,}", bold=True)
    if shown.bad:
        click.secho(shown.bad, fg="red")
    for seen in shown.pieces:
        piece = seen.piece
        parts = [f"{piece.source}: {piece.file}, row {piece.row:,}", f"{piece.length:,} tokens"]
        parts += [f"after {piece.skipped:,} others of it"] if piece.skipped else []
        parts += [f"{piece.rest:,} follow"] if piece.rest else []
        if (masked := piece.length - (piece.rest == 0) - seen.n_labels) > 0:
            parts.append(f"{masked:,} without a label")
        click.secho(f"── {'; '.join(parts)}", fg="cyan")
        click.echo(seen.text)
    if shown.n_padding:
        click.secho(f"── {shown.n_padding:,} tokens of padding", fg="cyan")


def _begins(plan: dict[str, Any]) -> str:
    token = plan["data"].get("begins_with")
    return f"; each document begins with {token}" if token else ""


def planned_sweep(plan: dict[str, Any]) -> None:
    """The sweep, then the trials with the first and the last value of every searched key."""
    from raydist.track.humanize import short

    click.echo(
        f"sweep {plan['name']}: {plan['trials']:,} trials, at most {short(plan['tokens_at_most'])} tokens"
        " over all of them"
    )
    for key, (*_, last) in plan["searched"].items():
        click.echo(f"  {key}: {plan['searched'][key][0]} to {last}")
    for which in ("first", "last"):
        click.echo(f"with the {which} value of each:")
        planned(plan[which])


def _stages(steps: dict[str, Any]) -> str:
    """Empty where there is but one."""
    stages = (f"{of['steps']:,} of {of['block_size']:,} tokens a block" for of in steps["stages"])
    return f" ({', then '.join(stages)})" if len(steps["stages"]) > 1 else ""


def _parts(parts: dict[str, int]) -> str:
    from raydist.track.humanize import size

    inner = ", ".join(f"{name.replace('_', ' ')} {size(n)}" for name, n in parts.items() if name != "total")
    return f"{size(parts['total'])} ({inner})"


def _not_used(left_out: dict[str, dict[str, Any]]) -> None:
    """What a source's folders and globs hold and it does not use, by reason; see corpus.files.LeftOut."""
    for reason, found in left_out.items():
        more = ", ..." if found["count"] > len(found["examples"]) else ""
        click.echo(f"  not used, {reason}: {found['count']:,} ({', '.join(found['examples'])}{more})")


def prepared(described: dict[str, Any]) -> None:
    from raydist.corpus.log_folder import LogFolder
    from raydist.errors import LogError

    for name, source in (described["sources"] | described["eval_sources"]).items():
        click.echo(
            f"{name}: {source['n_documents']:,} documents, {source['n_tokens']:,} tokens"
            f" ({source['mean_tokens']:,.1f} a document), {source['n_shards']:,} shards in {source['path']}"
        )
        if n := source.get("duplicate_documents"):
            click.echo(f"  {n:,} documents whose text occurred before, left out")
        if n := source["n_quarantined"]:
            listed = LogFolder(Path(source["path"])).quarantine_file
            click.echo(f"  {n:,} unreadable records or files: {listed}")
        if n := source["n_empty"]:
            click.echo(f"  {n:,} documents without text after cleaning, left out")
        with suppress(LogError, FileNotFoundError):  # one that is still being made has none yet
            _not_used(LogFolder(Path(source["path"])).read_manifest().get("left_out", {}))
    click.echo(f"{described['unique_share']:.2%} of the documents are unique")
    for packing in described["packing"]:
        click.echo(
            f"packed ({packing['strategy']}): {packing['n_blocks']:,} blocks of {packing['block_size']:,}"
            f" tokens, {packing['padding_share']:.2%} padding"
        )


def verified(found: Verified) -> None:
    """What was read, and each damage with what to do."""
    from raydist.track.humanize import size

    for error in found.damage:
        click.secho(f"damaged: {error}", fg="red")
    outcome = f"{len(found.damage):,} damaged" if found.damage else "all as they were written"
    click.echo(f"{found.n_files:,} files, {size(found.n_bytes)}: {outcome}")


def runs(rows: list[dict[str, Any]]) -> None:
    """One line each; dates in this machine's time."""
    facts = ([row["name"], row["state"], _step(row), _figure(row.get("loss")), _date(row)] for row in rows)
    _table([["NAME", "STATE", "STEP", "LOSS", "SINCE"], *facts])


def _table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def run(known: dict[str, Any]) -> None:
    """How a run stands, a fact a line; what is not known is left out."""
    from raydist.track.humanize import phases

    rate, mfu = known.get("tokens_per_second"), known.get("mfu")
    facts = [
        ("", f"{known['name']}: {known['state']} since {_date(known)}"),
        ("error", known.get("error")),
        ("driver", known.get("driver")),
        ("silent", known.get("silence")),
        ("step", _step(known)),
        ("tokens", f"{known['tokens']:,}" if known.get("tokens") else None),
        ("skipped", f"{known['skipped_steps']:,} steps" if known.get("skipped_steps") else None),
        ("loss", _figure(known.get("loss"))),
        ("tokens/s", rate and f"{rate:,.0f}" + (f", MFU {100 * mfu:.0f}%" if mfu else "")),
        *(
            ("perplexity", f"{name}: {_figure(of['first'])} -> {_figure(of['last'])}")
            for name, of in known.get("perplexity", {}).items()
        ),
        ("time", phases(known.get("seconds", {}))),
        ("ETTR", _effective(known.get("effective_training_time"))),
        ("attempts", known.get("attempts")),
        ("workers", known.get("workers")),
        ("attention", known.get("attention")),
        ("checkpoints", ", ".join(f"step {step:,}" for step in known.get("checkpoints", ()))),
        *((name, known.get(name)) for name in ("folder", "job", "model", "report")),
    ]
    for name, fact in facts:
        if fact:
            click.echo(f"  {name:<12} {fact}" if name else fact)


def _effective(time: dict[str, float] | None) -> str:
    """The share of a run's time that went into steps that count."""
    from raydist.track.humanize import duration

    if time is None:
        return ""
    return f"{time['ratio']:.1%} effective training time, of {duration(time['wall_seconds'])}"


def _step(known: dict[str, Any]) -> str:
    return f"{known.get('step') or 0:,}/{known['steps']:,}" if known.get("steps") else ""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"


def _date(known: dict[str, Any]) -> str:
    from datetime import datetime

    since = known.get("since")
    return f"{datetime.fromisoformat(since).astimezone():%Y-%m-%d %H:%M:%S}" if since else ""


def result(result: RunResult) -> None:
    """Perplexity before and after, where every token and second went, a sample, and where things are."""
    from raydist.folder import RunFolder
    from raydist.track.ettr import effective_time
    from raydist.track.humanize import phases
    from raydist.track.records import evaluations, phase_seconds, read_metrics, supersede

    folder = RunFolder(result.folder)
    data, written = folder.data(), read_metrics(folder)
    click.echo()
    for name, of_source in evaluations(supersede(written)).items():
        first, last = of_source[0], of_source[-1]
        click.echo(
            f"held-out perplexity  {name}: {first['perplexity']:,.2f} -> {last['perplexity']:,.2f}"
            f"  ({first['bits_per_byte']:.3f} -> {last['bits_per_byte']:.3f} bits per byte)"
            + (f"  forgotten: {last['forgetting']:+.4f} nats" if "forgetting" in last else "")
        )
    if audit := data.get("audit"):
        click.echo(
            f"tokens in {audit['n_in']:,} = trained {audit['n_trained']:,}"
            f" + held out {audit['n_held_out']:,}"
            + (f" + duplicate {audit['n_duplicate']:,}" if audit["n_duplicate"] else "")
            + (f" + skipped {audit['n_skipped']:,}" if audit.get("n_skipped") else "")
            + f" + left {audit['n_left']:,}"
        )
        if audit["n_repeated"]:
            click.echo(f"  in addition, {audit['n_repeated']:,} tokens were trained again in later epochs")
    if spent := phase_seconds(written):
        click.echo(f"time  {phases(spent)}")
    if effective := effective_time(written):
        click.echo(f"ETTR  {_effective(effective.to_json())}")
    if sample := data.get("sample"):
        click.echo(f"prompt        {sample['prompt']!r}\ncontinuation  {sample['continuation']!r}")
    click.echo(f"model   {shown(folder.model)}\nreport  {shown(folder.report)}")


def sweep(result: SweepResult, *, whole: bool = True) -> None:
    """Every trial, best first. whole: the sweep came to its end, so that the best one is known."""
    from raydist.folder import RunFolder

    searched = list(result.trials[0].parameters) if result.trials else []
    rows = [["TRIAL", *searched, "BITS PER BYTE", "TOKENS", "STATE"]]
    for trial in result.trials:
        bits = "" if trial.bits_per_byte is None else f"{trial.bits_per_byte:.4f}"
        values = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in trial.parameters.values())
        rows.append([trial.name, *values, bits, f"{trial.tokens:,}", trial.state])
    click.echo()
    _table(rows)
    click.echo(f"report  {shown(RunFolder(result.folder).sweep_page)}")
    if result.best is not None and whole:
        click.echo(f"next: raydist submit {result.best}")
