"""Small models of timm, also where torchvision is missing."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch

from small_models import spread

_VARIANTS = {
    "plain": {},
    "layer_scale": {"init_values": 0.3},
    "qk_norm": {"qk_norm": True},
    "registers": {"reg_tokens": 3},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2, "init_values": 0.5},
    "gated": {"mlp_layer": "SwiGLUPacked"},
}
_EVA_VARIANTS = {
    "rope": {"use_rot_pos_emb": True, "init_values": 0.3, "swiglu_mlp": True},
    "rope_by_head": {"use_rot_pos_emb": True, "rope_type": "mixed", "no_embed_class": True},
    "rope_registers": {"use_rot_pos_emb": True, "num_reg_tokens": 2, "attn_type": "rope", "qk_norm": True},
}
VARIANTS = (*_VARIANTS, *_EVA_VARIANTS)


class _Name(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _StandIn(types.ModuleType):
    """A module of torchvision with any class in it, none of which can do anything."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def load_timm():
    """timm, also without torchvision: its transformers need nothing of it, and yet it is imported with them.

    Beside a torch without CUDA, PyPI's torchvision does not load, and transformers breaks wherever it is installed so.
    The stand-in is there only while timm is imported: nothing else sees it.
    """
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def timm_or_skip():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm: pip install --no-deps timm")
    return load_timm()


def timm_model(kind="plain", seed=0, factor=8, **options):
    """A model of 4 blocks that sees 64 patches."""
    timm_or_skip()
    from timm.layers import SwiGLUPacked
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    common = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    if kind in _EVA_VARIANTS:
        return spread(Eva(num_classes=5, **{**common, **_EVA_VARIANTS[kind], **options}), factor)
    options = {**_VARIANTS[kind], **options}
    if options.get("mlp_layer") == "SwiGLUPacked":
        options["mlp_layer"] = SwiGLUPacked
    return spread(VisionTransformer(num_classes=5, **{**common, **options}), factor)


@torch.no_grad()
def written_weights(model, seed=0):
    """The model with weights that depend on their names and shapes alone, not on how timm draws them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(values if name.endswith(("embed", "token")) else values * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(values * 0.2 + (1 if "norm" in name and name.endswith("weight") else 0))
    return model
