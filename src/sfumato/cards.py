"""Model cards: README.md of a repository of the hub, a head for machines and a text for people.

What a card says is what `sfumato.io.inspect` reads from descriptions and headers: nothing is invented, and what is not
known is left out. The head's fields are those of the hub: library_name, pipeline_tag, tags, base_model, license.
"""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from sfumato.catalogue import NAME_TABLES
from sfumato.hub import place_of

WORDS = ("prompts", "text", "texts")  # conditioners that read prompts
PICTURES = ("inpainting", "hint", "image", "image_tokens", "vision")
CLASSES = ("labels",)
SHOWN = 160  # characters of one value


def card(repo: str, said: Mapping[str, Any], layout: str, base: str | None = None, license: str | None = None) -> str:
    """The card of what `said` describes, as of `sfumato.io.inspect.inspected`.

    layout: "sfumato", "diffusers" or "lora". base: of an adapter the model that it is for; of others what it was
    trained from, where that is on the hub.
    """
    asks = _asks(said, layout)
    base = base or _origin(said)
    on_hub = base if base is not None and place_of(base) is not None else None
    head: dict[str, Any] = {"library_name": "sfumato" if layout == "sfumato" else "diffusers"}
    if license is not None:
        head["license"] = license
    if (tag := _task(asks, said)) is not None:
        head["pipeline_tag"] = tag
    if on_hub is not None:
        head |= {"base_model": on_hub, "base_model_relation": "adapter" if layout == "lora" else "finetune"}
    head["tags"] = _tags(said, layout, asks)
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    use = _use_of_lora(repo, base) if layout == "lora" else _use(repo, said, layout, asks)
    return f"---\n{front}---\n\n# {repo.partition('/')[2]}\n\n{_table(said, base)}\n\n## Use\n\n{use}\n"


# What it is


def _asks(said: Mapping[str, Any], layout: str) -> str:
    """What a model is told: "prompt", "picture" (and a prompt), "class" or "nothing"; "part" for what is no whole."""
    if layout == "lora":
        return "prompt"
    if said["kind"] == "part of a pipeline" or said.get("class", said.get("family")) is None:
        return "part"
    if layout == "diffusers":
        parts, kind = said["parts"], str(said.get("class"))
        if any(word in kind for word in ("Inpaint", "Img2Img", "ControlNet", "Fill", "Control")):
            return "picture"
        if any(name.startswith("text_encoder") for name in parts):
            return "prompt"
        return "class" if kind.startswith("DiT") else "nothing"
    told = said.get("conditioner")
    kinds = told if isinstance(told, list) else [told]
    if any(kind in PICTURES for kind in kinds):
        return "picture"
    if any(kind in WORDS for kind in kinds):
        return "prompt"
    return "class" if any(kind in CLASSES for kind in kinds) else "nothing"


def _task(asks: str, said: Mapping[str, Any]) -> str | None:
    """The hub's name of the task; an autoencoder or a control alone has none."""
    names = {"prompt": "text-to-image", "picture": "image-to-image"}
    return None if asks == "part" else names.get(asks, "unconditional-image-generation")


def _tags(said: Mapping[str, Any], layout: str, asks: str) -> list[str]:
    tags = ["sfumato", "diffusion"]
    if said.get("family"):
        tags.append(str(said["family"]).replace("_", "-"))
    if layout == "lora":
        tags += ["lora", "text-to-image"]
    if said.get("class") == "ControlNetModel":
        tags.append("controlnet")
    if said.get("prediction") in ("velocity", "flow"):
        tags.append("flow-matching")
    return list(dict.fromkeys(tags))


def _origin(said: Mapping[str, Any]) -> str | None:
    """What a model says that it began with."""
    found = said.get("facts", {}).get("start") or said.get("metadata", {}).get("sfumato.base")
    return str(found) if found else None


def _table(said: Mapping[str, Any], base: str | None) -> str:
    rows = {"What": said["kind"], "Family": said.get("family"), "Pipeline": said.get("class")}
    rows |= {"Path of noise": said.get("path of noise"), "Prediction": said.get("prediction")}
    if isinstance(size := said.get("size"), list):
        rows["Size"] = "x".join(map(str, size))
    parts = said.get("parts", {})
    rows["Parameters"] = ", ".join(f"{part} {one['parameters']:,}" for part, one in parts.items()) or (
        f"{said['parameters']:,}" if "parameters" in said else None
    )
    if said.get("ranks"):
        rows["Ranks"] = ", ".join(map(str, said["ranks"]))
    rows["For" if said["kind"] == "LoRA" else "Trained from"] = base
    sampling = {name: value for name, value in (said.get("sampling") or {}).items() if value not in (None, 0.0)}
    rows["Recommended"] = json.dumps(sampling) if sampling else None
    facts = {name: value for name, value in (said.get("facts") or {}).items() if name != "start"}
    rows["Training"] = json.dumps(facts) if facts else None
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


# How it is used


def _fence(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _use(repo: str, said: Mapping[str, Any], layout: str, asks: str) -> str:
    if asks == "part":
        return _use_of_part(repo, said)
    words = {"prompt": '"a prompt"', "picture": '"a prompt" --image picture.png'}
    words |= {"class": "--condition label=0", "nothing": ""}
    asked = {"prompt": '"a prompt"', "picture": '"a prompt", image="picture.png"', "class": "0", "nothing": ""}
    out = [
        "With sfumato:",
        _fence("sh", f"sfumato sample {repo} {words[asks]}".rstrip()),
        _fence(
            "python",
            f'import sfumato\n\npipeline = sfumato.load("{repo}")\npipeline.sample({asked[asks]}).save("pictures")',
        ),
    ]
    if layout == "diffusers":
        theirs = {"prompt": '"a prompt"', "picture": '"a prompt", image=picture', "class": "class_labels=[0]"}
        call = f"pipeline({theirs.get(asks, '')}).images[0]"
        load = f'DiffusionPipeline.from_pretrained("{repo}")'
        if asks == "picture":
            load = f'{said["class"]}.from_pretrained("{repo}")'
        name = load.partition(".")[0]
        out += ["With diffusers:", _fence("python", f"from diffusers import {name}\n\npipeline = {load}\n{call}")]
    elif said.get("family") in NAME_TABLES:
        out += ["For diffusers, in its layout:", _fence("sh", f"sfumato convert {repo} FOLDER --to diffusers")]
    return "\n\n".join(out)


def _use_of_part(repo: str, said: Mapping[str, Any]) -> str:
    """Of an autoencoder or a control."""
    kind = said.get("class")
    if kind is not None and "ControlNet" in str(kind):
        mine = _fence("sh", f'sfumato sample MODEL "a prompt" --control {repo}:picture.png')
    else:
        mine = _fence("sh", f'sfumato train stable-diffusion-scenes "model.codec={{kind: latents, weights: {repo}}}"')
    out = ["With sfumato:", mine]
    if kind is not None:
        text = f'from diffusers import {kind}\n\npart = {kind}.from_pretrained("{repo}")'
        out += ["With diffusers:", _fence("python", text)]
    return "\n\n".join(out)


def _use_of_lora(repo: str, base: str | None) -> str:
    model = base or "MODEL"
    return "\n\n".join(
        [
            "With sfumato:",
            _fence("sh", f'sfumato sample {model} "a prompt" --lora {repo}'),
            _fence(
                "python",
                f'import sfumato\n\npipeline = sfumato.load("{model}")\npipeline.load_lora("{repo}")\n'
                'pipeline.sample("a prompt").save("pictures")',
            ),
            "With diffusers:",
            _fence(
                "python",
                f'from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("{model}")\n'
                f'pipeline.load_lora_weights("{repo}")\npipeline("a prompt").images[0]',
            ),
        ]
    )
