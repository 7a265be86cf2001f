"""What the commands print: a plan, the token logs, and the summary that ends a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from raydist.run import RunResult


def as_json(value: Any) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())


def planned(plan: dict[str, Any]) -> None:
    click.echo(f"job {plan['name']}")
    for name, source in plan["data"]["sources"].items():
        click.echo(
            f"  {name}: {source['files']:,} files, {_bytes(source['file_bytes'])},"
            f" {source['slices']:,} slices;"
            f" about {source['documents']:,} documents, {source['tokens']:,} tokens; log {source['log']}"
        )
    steps, parameters = plan["steps"], plan["parameters"]
    click.echo(
        f"  tokenizer {plan['data']['tokenizer']}; about {plan['data']['blocks']:,} blocks\n"
        f"  {steps['optimizer_steps']:,} steps of {steps['tokens_per_step']:,} tokens"
        f" on {steps['workers']} workers:"
        f" {steps['accumulation_steps']} micro batches of {steps['micro_batch_size']} sequences each\n"
        f"  {parameters['total']:,} parameters, {parameters['trainable']:,} of them trained\n"
        f"  memory per worker: {_parts(plan['memory_per_worker_bytes'])}\n"
        f"  disk: {_parts(plan['disk_bytes'])}"
    )


def _parts(parts: dict[str, int]) -> str:
    inner = ", ".join(f"{name.replace('_', ' ')} {_bytes(n)}" for name, n in parts.items() if name != "total")
    return f"{_bytes(parts['total'])} ({inner})"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.3g} TiB"


def prepared(described: dict[str, Any]) -> None:
    for name, source in (described["sources"] | described["eval_sources"]).items():
        click.echo(
            f"{name}: {source['n_documents']:,} documents, {source['n_tokens']:,} tokens,"
            f" {source['n_shards']:,} shards in {source['path']}"
        )
        if n := source["n_quarantined"]:
            click.echo(f"  {n:,} unreadable records or files: {source['path']}/quarantine.jsonl")
        if n := source["n_empty"]:
            click.echo(f"  {n:,} documents without text after cleaning, left out")
    packing = described["packing"]
    click.echo(
        f"packed ({packing['strategy']}): {packing['n_blocks']:,} blocks of {packing['block_size']:,} tokens,"
        f" {packing['padding_share']:.2%} padding"
    )


def result(result: RunResult) -> None:
    """Perplexity before and after, where every token went, a sample, and where things are."""
    from raydist.folder import RunFolder
    from raydist.track.records import effective, evaluations

    folder = RunFolder(result.folder)
    data = folder.data()
    click.echo()
    for name, of_source in evaluations(effective(folder.path)).items():
        first, last = of_source[0], of_source[-1]
        click.echo(
            f"held-out perplexity  {name}: {first['perplexity']:,.2f} -> {last['perplexity']:,.2f}"
            f"  ({first['bits_per_byte']:.3f} -> {last['bits_per_byte']:.3f} bits per byte)"
        )
    if audit := data.get("audit"):
        click.echo(
            f"tokens in {audit['n_in']:,} = trained {audit['n_trained']:,}"
            f" + held out {audit['n_held_out']:,} + left {audit['n_left']:,}"
        )
        if audit["n_repeated"]:
            click.echo(f"  beside these, {audit['n_repeated']:,} tokens were trained again in later epochs")
    if sample := data.get("sample"):
        click.echo(f"prompt        {sample['prompt']!r}\ncontinuation  {sample['continuation']!r}")
    click.echo(f"model   {folder.model}\nreport  {folder.report}")
