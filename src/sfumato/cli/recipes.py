"""`sfumato recipes`: the configurations that come with the library."""

import typer
from rich.table import Column, Table

from sfumato.cli.show import as_json, out


def recipes(json: bool = typer.Option(False, "--json", help="As JSON.")) -> None:
    """List the recipes: configurations that work as they are, and to extend."""
    from sfumato.overlay import recipes as found

    rows = [
        {"name": one.name, "summary": one.summary, "path": str(one.path), "measured": one.measured} for one in found()
    ]
    if json:
        as_json(rows)
        return
    name = Column("recipe", no_wrap=True)
    table = Table(name, "what it makes", "score", "1, 2, 4 steps", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for one in found():
        measured = one.measured or {}
        score, few = measured.get("score"), measured.get("steps", {})
        said = "" if score is None else f"{score:.2f} {measured.get('metric', '')}".strip()
        table.add_row(one.name, one.summary, said, " ".join(f"{of_steps:.2f}" for of_steps in few.values()))
    out.print(table)
    out.print(
        "\nsfumato train RECIPE                  trains one"
        "\nsfumato distill RECIPE teacher=RUN     teaches a student, where it is a method of distillation"
        "\nsfumato train RECIPE --print-config   shows all it sets, to copy and change",
        markup=False,
    )
