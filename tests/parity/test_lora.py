"""LoRA against diffusers and peft, on a small Stable Diffusion with every weight random, both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.tuned import random_adapter, same
from tests.clip import randomised
from tests.parity.test_stable_diffusion import KINDS, SMALL, heads_of, pipeline_of
from torch import Tensor

from sfumato.adapters.lora import Living, merge_into
from sfumato.adapters.parts import Part, net_part, parts_of
from sfumato.adapters.reading import Adapter, read_adapter
from sfumato.adapters.writing import write_adapter
from sfumato.io.families.stable import config_of, lines
from sfumato.io.keymap import DIFFUSERS, OURS, renamed
from sfumato.io.published import load_published
from sfumato.model import Model
from sfumato.nets.stable_unet import StableUNet

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "conv1", "time_emb_proj"]
TEXT = ["q_proj", "v_proj", "fc1"]


@pytest.fixture(autouse=True)
def _this_peft_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a newer one, for what is not used here."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.15.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lora")
    pipeline_of(place, "epsilon")
    return place / "whole"


@pytest.fixture
def pipe(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.fixture
def model(folder: Path) -> Model:
    return load_published(folder)


def answers(pipe: Any, model: Model) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What both networks and both text encoders say: (theirs, ours) of each."""
    rng = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 4, 8, 16, generator=rng), torch.randn(2, 7, 12, generator=rng)
    t, ids = torch.tensor([981, 3]), torch.tensor([[1, 5, 9, 2]])
    text: Any = model.conditioner
    with torch.no_grad():
        said = pipe.text_encoder(input_ids=ids).last_hidden_state
        heard = text.encoder(input_ids=ids).last_hidden_state
        return (pipe.unet(x, t, context).sample, model.net(x, t.float(), context=context)), (said, heard)


def told_alike(pipe: Any, model: Model) -> None:
    for theirs, ours in answers(pipe, model):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def changed(pipe: Any, before: Any) -> None:
    assert all(float((now - was).abs().max()) > 0.05 for now, was in zip(pipe, before, strict=True))


def add_random(pipe: Any, dora: bool) -> None:
    """A LoRA as their training scripts make it: by peft's adapters in the U-Net and the text encoder."""
    rng = torch.Generator().manual_seed(3)
    for module, targets in ((pipe.unet, UNET), (pipe.text_encoder, TEXT)):
        module.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora))
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=rng) * 0.3 + (1.5 if "magnitude" in name else 0))


def state_of(module: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(module)
    return found


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("told", [True, False])
def test_what_diffusers_writes_has_the_same_effect_here(
    pipe: Any, model: Model, tmp_path: Path, dora: bool, told: bool
) -> None:
    """With its description in the header, and without, where alpha is the rank."""
    plain = [ours.clone() for _, ours in answers(pipe, model)]
    add_random(pipe, dora)
    metadata = {}
    if told:
        for name, part in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
            metadata[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    else:
        for part in (pipe.unet, pipe.text_encoder):
            for module in part.modules():
                if hasattr(module, "set_scale"):
                    module.scaling["default"] = 1.0
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=state_of(pipe.unet),
        text_encoder_lora_layers=state_of(pipe.text_encoder),
        **metadata,
    )
    living = Living(model)
    living.add("theirs", read_adapter(tmp_path, living.parts))
    told_alike(pipe, model)
    changed([ours for _, ours in answers(pipe, model)], plain)
    living.merge()
    told_alike(pipe, model)
    living.remove("theirs")
    assert all(torch.equal(ours, was) for (_, ours), was in zip(answers(pipe, model), plain, strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_what_we_write_has_the_same_effect_in_diffusers(pipe: Any, model: Model, tmp_path: Path, dora: bool) -> None:
    """Every layer, of several ranks and alphas; both merged and beside the weights."""
    adapter = random_adapter(parts_of(model), dora=dora)
    write_adapter(tmp_path / "pytorch_lora_weights.safetensors", adapter, parts_of(model))
    pipe.load_lora_weights(tmp_path)
    plain = answers(pipe, model)
    assert all(float((ours - theirs).abs().max()) > 0.05 for theirs, ours in plain)
    living = Living(model)
    living.add("ours", adapter)
    told_alike(pipe, model)
    same(read_adapter(tmp_path, living.parts), adapter)
    living.remove("ours")
    merge_into(model, [(adapter, 1.0)])
    told_alike(pipe, model)


def test_scales_of_several_are_as_theirs(pipe: Any, model: Model, tmp_path: Path) -> None:
    living = Living(model)
    some = [random_adapter(living.parts, dora=dora, ranks=(n,)) for n, dora in ((2, False), (3, False))]
    for name, adapter in zip("ab", some, strict=True):
        write_adapter(tmp_path / f"{name}.safetensors", adapter, living.parts)
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
        living.add(name, read_adapter(tmp_path / f"{name}.safetensors", living.parts))
    for scales in ({"a": 0.3, "b": -0.7}, {"b": 1.0}, {"a": 0.5}):
        pipe.set_adapters(list(scales), list(scales.values()))
        living.set(scales)
        told_alike(pipe, model)


# kohya

ONE_ALPHA = (
    5.0,
)  # of several, diffusers 0.42 takes the most frequent for all of a kohya file: its patterns match nothing


def loadable(part: Part) -> Adapter:
    """A change of what diffusers' converter of kohya's names can read."""
    adapter = random_adapter([part], alphas=ONE_ALPHA)
    kept = {
        name: one
        for name, one in adapter.changes.items()
        if any(word in name for word in ("blocks.", "self_attn", "mlp", "conv1", "conv2", "transformer."))
    }
    return Adapter(kept)


def test_kohyas_files_of_ours_have_the_same_effect_in_diffusers(pipe: Any, model: Model, tmp_path: Path) -> None:
    living = Living(model)
    both = {**loadable(living.parts[0]).changes, **loadable(living.parts[1]).changes}
    write_adapter(tmp_path / "k.safetensors", Adapter(both), living.parts, "kohya")
    pipe.load_lora_weights(tmp_path, weight_name="k.safetensors")
    living.add("ours", Adapter(both))
    told_alike(pipe, model)
    again = read_adapter(tmp_path / "k.safetensors", living.parts)
    assert again.dialect == "kohya" and again.metadata["ss_network_module"] == "networks.lora"
    same(again, Adapter(both))


def test_kohyas_files_of_diffusers_have_the_same_effect_here(pipe: Any, model: Model, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    add_random(pipe, False)
    state = {f"unet.{key}": value for key, value in state_of(pipe.unet).items()}
    written = convert_state_dict_to_kohya(state)
    for key in [key for key in written if key.endswith(".alpha")]:
        written[key] = torch.tensor(5.0)
    save_file({key: value.contiguous() for key, value in written.items()}, tmp_path / "k.safetensors")
    living = Living(model)
    living.add("theirs", read_adapter(tmp_path / "k.safetensors", living.parts))
    (theirs, ours), _ = answers(pipe, model)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_sdxl_by_the_names_of_the_original_is_what_diffusers_converts(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    peer = randomised(diffusers.UNet2DConditionModel(**{**SMALL, **KINDS["sdxl"]}))
    config = config_of(peer.state_dict(), DIFFUSERS, "here", heads_of(peer), 8)
    net = StableUNet(config)
    net.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    part = net_part(net, "stable_unet")
    adapter = random_adapter([part], alphas=ONE_ALPHA)
    file = write_adapter(tmp_path / "xl.safetensors", adapter, [part], "kohya")
    same(read_adapter(file, [part]), adapter)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(tmp_path, weight_name=file.name, unet_config=peer.config)
    assert len(alphas) == len(part.shapes)
    peer.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    found = dict(peer.named_modules())
    for line in part.lines:
        theirs, ours = found[line.names[DIFFUSERS][0]], adapter.changes[f"net.{line.names[OURS][0]}"]
        factors = (half["default_0"].weight for half in (theirs.lora_B, theirs.lora_A))
        up, down = (half.flatten(1) for half in factors)
        change = theirs.scaling["default_0"] * (up @ down)
        torch.testing.assert_close(change.view_as(ours.product()), ours.product(), **CLOSE)


def test_peft_loads_our_folder(pipe: Any, model: Model, tmp_path: Path) -> None:
    """Over their U-Net; of several parts each has a folder."""
    living = Living(model)
    adapter = random_adapter(living.parts)
    write_adapter(tmp_path / "both", adapter, living.parts, "peft")
    assert sorted(one.name for one in (tmp_path / "both").iterdir() if one.is_dir()) == ["text_encoder", "unet"]
    pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, tmp_path / "both" / "unet").eval()
    pipe.text_encoder = peft.PeftModel.from_pretrained(pipe.text_encoder, tmp_path / "both" / "text_encoder").eval()
    living.add("ours", adapter)
    told_alike(pipe, model)
    same(read_adapter(tmp_path / "both", living.parts), adapter)


@pytest.mark.parametrize("stable", [False, True])
def test_a_folder_of_peft_has_the_same_effect_here(pipe: Any, model: Model, tmp_path: Path, stable: bool) -> None:
    """With ranks and alphas by pattern, and rank-stabilised."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=UNET,
        rank_pattern={"attn2.to_k": 4},
        alpha_pattern={"ff.net.2": 7},
        use_rslora=stable,
    )
    pipe.unet = peft.get_peft_model(pipe.unet, config)
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    pipe.unet.save_pretrained(tmp_path)
    living = Living(model)
    living.add("theirs", read_adapter(tmp_path, living.parts))
    (theirs, ours), _ = answers(pipe, model)
    torch.testing.assert_close(ours, theirs, **CLOSE)
