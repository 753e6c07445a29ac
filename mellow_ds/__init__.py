"""mellow-ds: train small audio-language models of the Mellow kind on tar shards with DeepSpeed.

The public names are loaded on first use, so that `import mellow_ds` does not import torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "MellowConfig": "mellow_ds.model.configuration",
    "MellowForConditionalGeneration": "mellow_ds.model.modeling",
    "MellowProcessor": "mellow_ds.model.processing",
}
__all__ = ["MellowConfig", "MellowForConditionalGeneration", "MellowProcessor", "__version__"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mellow_ds' has no attribute '{name}'")
