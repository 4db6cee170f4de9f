"""`sfumato doctor`: what is wrong with the machine, or with a run."""

from pathlib import Path

import typer

from sfumato.cli.show import as_json, out, say

MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "fault": "[red]✗[/]"}


def doctor(
    run: Path | None = typer.Argument(None, help="A run to examine. None: the machine alone.", metavar="[RUN]"),
    per_task: int = typer.Option(10, "--per-task", min=1, help="Prompts of each task, for the response to guidance."),
    device: str = typer.Option("auto", "--device", help="cpu, cuda, mps, ..."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Examine the machine, and of a run: does it listen to prompts, tell them apart, respond to guidance?

    Exit code 1 if something is at fault.
    """
    from rich.markup import escape

    from sfumato.doctor import environment, of_run
    from sfumato.pipeline import load

    pipeline = None if run is None else load(run, device)
    findings = environment(run or Path())
    if run is not None and pipeline is not None:
        say("examining the model; this draws some pictures")
        findings += of_run(run, pipeline, per_task=per_task)
    ok = all(one.state != "fault" for one in findings)
    if json:
        as_json({"ok": ok, "findings": [one._asdict() for one in findings]})
    for one in [] if json else findings:
        out.print(f"{MARKS[one.state]} [bold]{one.name}[/]  {escape(one.seen)}", soft_wrap=True)
        if one.advice:
            out.print(f"    {escape(one.advice)}", soft_wrap=True)
    if not ok:
        raise typer.Exit(1)  # for scripts: something is wrong, and it is said above
