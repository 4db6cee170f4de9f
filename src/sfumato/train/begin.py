"""What a run begins with: its configuration, completed by the model that it starts from.

The configuration names a model; what that is, is known when it is read. It may get a ControlNet, whose network is then
around its own, and its settings of sampling come along. `sfumato.train.teaching.as_student` adds what a method of
distillation asks for.
"""

from pathlib import Path

from sfumato.config import Config
from sfumato.overlay import load_config
from sfumato.train.control import under_control
from sfumato.train.start import Start, read_start, with_start


def begun(config: Config) -> tuple[Config, Start | None]:
    """The configuration with the model that it starts from, and that model, or None. CheckpointError for none there.

    Where the network is made over into another, the configuration says which, and stays as it is.
    """
    if config.start is None:
        return config, None
    start = read_start(config.start, config.start_key)
    if config.reparameterise is not None:
        return config, start
    if config.control is not None:
        start = under_control(start, config.control, config.seed)
    return with_start(config, start), start


def resumed(config: Config, folder: Path) -> Config:
    """The configuration to go on with: the model and its sampling are what the run wrote down, where the configuration
    names what to start from and no model.
    """
    if config.model is not None:
        return config
    kept = load_config(str(folder / "config.yaml")).config
    sampling = config.sampling if "sampling" in config.model_fields_set else kept.sampling
    return config.model_copy(update={"model": kept.model, "sampling": sampling})
