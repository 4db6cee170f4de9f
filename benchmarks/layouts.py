"""How well pictures follow a layout: things of scenes that stand where it has them, in their shape.

    python benchmarks/layouts.py runs/layout-scenes
    python benchmarks/layouts.py runs/control --without runs/base --tasks single

The model is asked for the captions of scenes that no training has seen, with their layouts and without; the exact
recogniser reads what it draws. A thing is placed if one of its shape is found within 2 pixels of where it should be.
"""

import argparse
import json
from pathlib import Path

from sfumato import load
from sfumato.data.scenes import Scenes, parse, recognise

NEAR = 2  # pixels


def main() -> None:
    """Prints counts as JSON, with the layout and without."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("run", type=Path, help="a model that reads the field layout")
    reader.add_argument("--without", type=Path, help="the model to compare with; the same, unless said")
    reader.add_argument("--pictures", type=int, default=48)
    reader.add_argument("--tasks", nargs="*", help="of scenes; all, unless said")
    reader.add_argument("--size", type=int, default=32)
    reader.add_argument("--seed", type=int, default=99)
    told = reader.parse_args()
    tasks = dict.fromkeys(told.tasks, 1.0) if told.tasks else None
    data = Scenes(size=told.size, seed=told.seed, layout="places", tasks=tasks)
    pictures = [data[i] for i in range(told.pictures)]
    counts = {}
    for name, run in (("with", told.run), ("without", told.without or told.run)):
        asked = [
            {"caption": one.fields["caption"], **({"layout": one.fields["layout"]} if name == "with" else {})}
            for one in pictures
        ]
        drawn = load(run).sample(asked, batch=24, steps=20).images
        things = [(recognise(one.image), recognise(image)) for one, image in zip(pictures, drawn, strict=True)]
        captions = [parse(str(one.fields["caption"])) for one in pictures]
        counts[name] = {
            "things": sum(len(wanted) for wanted, _ in things),
            "placed": sum(any(_same(a, b) for b in found) for wanted, found in things for a in wanted),
            "pictures": len(pictures),
            "as_said": sum(c.matches(found) for c, (_, found) in zip(captions, things, strict=True)),
        }
    print(json.dumps(counts, indent=1))


def _same(wanted, found) -> bool:  # type: ignore[no-untyped-def]
    near = abs(wanted.cy - found.cy) <= NEAR and abs(wanted.cx - found.cx) <= NEAR
    return bool(near and wanted.shape == found.shape)


if __name__ == "__main__":
    main()
