"""reduce inside timm's vision transformers, on every variant of them."""

import pytest
import torch
from timm_models import VARIANTS, timm_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import tokenwise as tw
from small_models import pictures
from tokenwise.errors import InputError
from tokenwise.models.tap import listen

METHODS = {"tome": tw.ToMe, "evit": tw.EViT, "random_drop": tw.RandomDrop}


@torch.no_grad()
def features(model, images):
    return model.forward_features(images)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("name", METHODS)
def test_reducing_equals_hiding(kind, name):
    model, images, method = timm_model(kind), pictures(), METHODS[name](keep=0.6)
    if kind == "no_class_token" and name == "evit":
        with pytest.raises(InputError, match="no class token"):
            tw.reduce(model, method)
        return
    dense = features(model, images)
    with tw.reduce(model, method) as handle:
        fast = features(model, images)
        assert 0.5 < handle.stats["mean_share"] <= 0.6
        positions = handle.last.positions
    with tw.reduce(model, method, masked=True) as handle:
        slow = features(model, images)
        assert torch.equal(handle.last.positions, positions)
    assert fast.shape[1] == positions.shape[1] < dense.shape[1] == slow.shape[1]
    assert torch.allclose(fast, slow.gather(1, positions.unsqueeze(2).expand_as(fast)), atol=1e-5)
    assert not torch.allclose(fast[:, 0], dense[:, 0], atol=1e-2)
    assert torch.equal(features(model, images), dense)


@pytest.mark.parametrize("kind", VARIANTS)
def test_no_reduction_is_dense_to_the_bit(kind):
    model, images = timm_model(kind), pictures()
    dense = model(images)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for method in (tw.ToMe(r=0), tw.ToMe(keep=1.0), tw.RandomDrop(keep=1.0)):
        with tw.reduce(model, method):
            assert torch.equal(model(images), dense)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", ["rope", "rope_by_head"])
def test_rotary_positions_follow_the_tokens(kind):
    model, images, rope = timm_model(kind), pictures(), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args, options: rope.append(options["rope"]), with_kwargs=True)
    features(model, images)
    dense, rope[:] = list(rope), []
    with tw.reduce(model, tw.EViT(keep=0.6, fuse=False)) as handle:
        handle._plans[65] = [7, 7, 7, 7]
        features(model, images)
        patches = handle.last.positions[:, 1:] - 1
    assert patches.shape == (2, 6)
    assert not torch.equal(patches[0], patches[1])
    assert torch.equal(rope[0], dense[0])
    for whole, fewer in zip(dense[1:], rope[1:], strict=True):
        for image in range(2):
            assert torch.equal(fewer[image].squeeze(0), whole[..., patches[image], :])


def test_attention_is_read_at_the_call():
    model, images = timm_model("qk_norm"), pictures()
    attention, seen = model.blocks[1].attn, []
    stop = listen(attention, lambda call: seen.append((call.rows(torch.tensor([0, 7])), call.columns(), call.value)))
    features(model, images)
    stop()
    rows, columns, value = seen[0]
    attention.fused_attn = False
    maps = []
    handle = attention.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    features(model, images)
    handle.remove()
    assert torch.allclose(rows, maps[0][:, :, [0, 7]], atol=1e-6)
    assert torch.allclose(columns, maps[0].mean(2), atol=1e-6)
    assert value.shape == (2, 4, 65, 8)


def test_an_interrupt_leaves_nothing_behind():
    model, images = timm_model(), pictures()
    dense, before = model(images), dict(vars(model.blocks[2].attn))
    depth = torch._C._len_torch_function_stack()

    def interrupt(*_):
        raise KeyboardInterrupt

    def interrupted():
        with tw.reduce(model, tw.ToMe(keep=0.6)):
            hook = model.blocks[2].attn.proj.register_forward_pre_hook(interrupt)
            try:
                model(images)
            finally:
                hook.remove()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch._C._len_torch_function_stack() == depth
    assert dict(vars(model.blocks[2].attn)) == before
    assert torch.equal(model(images), dense)


def test_what_cannot_be_reduced_is_refused():
    model, images = timm_model(), pictures(1)
    for block in model.blocks[2:]:
        block.attn.fused_attn = False
    dense = model(images)
    with pytest.raises(InputError, match=r"does not call PyTorch's fused attention.*set_fused_attn\(True\)"):
        tw.reduce(model, tw.ToMe())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(images), dense)
    with tw.reduce(model, tw.RandomDrop(keep=0.5)):  # which reads no attention
        assert not torch.equal(model(images), dense)

    from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ResPostBlock

    for block in (ResPostBlock, ParallelScalingBlock, DiffParallelScalingBlock):
        with pytest.raises(InputError, match="no encoder of a known layout"):
            tw.reduce(timm_model(block_fn=block), tw.ToMe())
    with pytest.raises(InputError, match="no encoder of a known layout"):
        tw.reduce(timm_model(attn_layer="diff"), tw.ToMe())
    with pytest.raises(InputError, match="no encoder of a known layout"):
        tw.reduce(timm_model("rope", use_post_norm=True), tw.ToMe())


@pytest.mark.parametrize("kind", ["registers", "rope"])
def test_tokens_of_every_block_are_refused(kind):
    model, images = timm_model(kind), pictures()
    dense = model.forward_intermediates(images, output_fmt="NLC")[1]
    with torch.no_grad(), tw.reduce(model, tw.ToMe(keep=0.5)) as handle:
        for options in ({}, {"output_fmt": "NLC"}):
            with pytest.raises(InputError, match="forward_intermediates: asks for the tokens after every block"):
                model.forward_intermediates(images, **options)
        assert model.forward_features(images).shape[1] == handle.stats["tokens_after"] < 40
    assert "forward_intermediates" not in vars(model)
    for options in ({"keep": 1.0}, {"keep": 0.5, "masked": True}):
        with torch.no_grad(), tw.reduce(model, tw.ToMe(keep=options.pop("keep")), **options):
            found = model.forward_intermediates(images, output_fmt="NLC")[1]
        assert [part.shape for part in found] == [part.shape for part in dense]


def test_gradient_checkpointing_is_refused_where_there_are_gradients():
    model, images = timm_model(), pictures()
    model.set_grad_checkpointing()
    with tw.reduce(model, tw.ToMe(keep=0.5)) as handle:
        for mode in (True, False):
            with pytest.raises(InputError, match=r"checkpoints gradients.*set_grad_checkpointing\(False\)"):
                model.train(mode)(images)
        with torch.no_grad():
            assert model(images).shape == (2, 5)
        model.set_grad_checkpointing(False)
        model(images).sum().backward()
    assert handle.stats["passes"] == 2
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_attention_that_is_not_called_is_an_error():
    module = torch.nn.Linear(3, 3)
    stop = listen(module, lambda call: None)
    with pytest.raises(InputError, match="does not call PyTorch's fused attention"):
        module(torch.ones(1, 3))
    stop()
    assert "forward" not in vars(module)
    assert module(torch.ones(1, 3)).shape == (1, 3)


def test_key_biases_reach_a_fused_call_with_a_causal_mask():
    class Causal(torch.nn.Module):
        def forward(self, query, key, value):
            return functional.scaled_dot_product_attention(query, key, value, None, 0.0, True, scale=0.3)

    module, values = Causal(), torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 9).expand(2, -1)
    seen = []

    def listener(call):
        call.add_key_bias(bias)
        seen.append(call.rows(torch.arange(9)))

    stop = listen(module, listener)
    output = module(*values)
    stop()
    scores = values[0] @ values[1].transpose(2, 3) * 0.3 + bias[:, None, None]
    expected = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf")).softmax(-1)
    assert torch.allclose(seen[0], expected, atol=1e-6)
    assert torch.allclose(output, expected @ values[2], atol=1e-6)


def test_no_map_of_all_tokens_is_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return output

    model = timm_model(img_size=256, depth=2, num_heads=2, embed_dim=16)
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), tw.reduce(model, tw.EViT(rate=0.5, places=(0.0,))) as handle, Largest() as seen:
        model(images)
    assert handle.stats["tokens_before"] == 4097
    assert 100_000 < seen.elements < 4097 * 256
