"""`sfumato push`: a model or an adapter onto the hub, with a card."""

from pathlib import Path

import typer

from sfumato.cli.show import as_json, line, say
from sfumato.errors import ConfigError, nearest

DTYPES = ("fp32", "fp16", "bf16")


def push(
    source: Path = typer.Argument(..., help="A run, a model, a folder of diffusers, or a LoRA.", metavar="SRC"),
    repo: str = typer.Argument(..., help="The repository: OWNER/NAME. It is made where there is none.", metavar="REPO"),
    to: str | None = typer.Option(None, "--to", help="sfumato or diffusers. [default: as it is]"),
    dtype: str = typer.Option("fp32", "--dtype", help="What weights that are written anew are stored as."),
    private: bool = typer.Option(False, "--private", help="A new repository is seen by its owner alone."),
    base: str | None = typer.Option(
        None, "--base", help="The model that a LoRA is for, or that was trained further. [default: what the file says]"
    ),
    license: str | None = typer.Option(None, "--license", help="For the card: apache-2.0, openrail++, ..."),
    revision: str | None = typer.Option(None, "--revision", help="A branch that is there. [default: main]"),
    message: str | None = typer.Option(None, "--message", "-m", help="Of the commit."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the card and the files, and send nothing."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Send a model to the Hugging Face Hub, with a card, in one commit.

    sfumato push runs/quickstart me/quickstart --dry-run
    sfumato push runs/pixel-art/lora.safetensors me/pixel-art --base stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    if dtype not in DTYPES:
        raise ConfigError("no such choice", where="--dtype", seen=dtype, fix=nearest(dtype, DTYPES))
    from sfumato.pipeline import DTYPES as KINDS
    from sfumato.push import CARD, packed
    from sfumato.push import push as send

    with packed(source, repo, to=to, dtype=KINDS[dtype], base=base, license=license) as parcel:
        sizes = parcel.sizes()
        address = None if dry_run else send(parcel, repo, private=private, revision=revision, message=message)
        if json:
            as_json({"repo": repo, "url": address, "layout": parcel.layout, "files": sizes, "card": parcel.card})
            return
        if address is not None:
            line(address)
        else:
            for name, size in sizes.items():
                line(f"{size:>14,}  {name}")
            say(f"{CARD} would be:\n\n{parcel.card}")
        verb = "would be sent" if address is None else "were sent"
        say(f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, {verb} to {repo}")
