"""`sfumato plan`: what a run would take."""

import typer

from sfumato.cli.show import as_json, line


def plan(
    source: str = typer.Argument(..., help="A recipe's name, or a YAML file.", metavar="RECIPE|FILE"),
    overrides: list[str] | None = typer.Argument(None, help="Changes: key=value.", metavar="[KEY=VALUE]..."),
    device: str | None = typer.Option(None, "--device", help="a100, h100, h200, ...: tells the time, and if it fits."),
    share: float = typer.Option(0.4, "--share", help="Of the device's peak that training reaches: a guess."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Say what a run would take: parameters, memory, arithmetic, and time on a device.

    sfumato plan quickstart --device h200
    """
    from sfumato.overlay import load_config

    config = load_config(source, overrides or []).config
    from sfumato.plan import plan as planned

    found = planned(config, device, share)
    if json:
        as_json(found.as_dict())
        return
    line(f"parameters    {found.parameters:,} learn, {found.frozen:,} do not")
    line(f"a picture     {found.flops / 1e9:,.2f} GFLOP forward, three times that in training")
    parts = ((found.weights, "weights"), (found.states, "gradients, moments, averages"), (found.activations, "kept"))
    line(f"memory        {_size(found.memory)}: " + ", ".join(f"{_size(size)} {what}" for size, what in parts))
    line(f"the run       {found.images:,} pictures, {found.run_flops / 1e15:,.2f} PFLOP")
    if found.hours is not None:
        fits = "fits" if found.fits else "does not fit into its memory"
        line(f"on one {device}  {found.hours:,.2f} hours at {share:.0%} of its peak; the batch {fits}")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
