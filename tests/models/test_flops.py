import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tokenwise.models.flops import FlopMeter

size = st.integers(1, 6)
few = settings(max_examples=15, deadline=None)


def flops_of(work):
    with FlopMeter() as meter:
        work()
    return meter.flops


@few
@given(size, size, size)
def test_every_form_of_a_matrix_product_counts_two_operations_per_multiply_add(m, k, n):
    left, right, total = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    forms = {
        "mm": lambda: left @ right,
        "mm.out": lambda: torch.mm(left, right, out=torch.empty(m, n)),
        "matmul.out": lambda: torch.matmul(left, right, out=torch.empty(m, n)),
        "addmm": lambda: torch.addmm(total, left, right),
        "addmm.out": lambda: torch.addmm(total, left, right, out=torch.empty(m, n)),
        "addmm_": lambda: total.addmm_(left, right),
        "_addmm_activation": lambda: torch._addmm_activation(total, left, right),
        "linear": lambda: F.linear(left, right.T),
    }
    assert {name: flops_of(work) for name, work in forms.items()} == dict.fromkeys(forms, 2 * m * k * n)


@few
@given(size, size, size, size)
def test_batched_forms(b, m, k, n):
    left, right, total = torch.randn(b, m, k), torch.randn(b, k, n), torch.randn(b, m, n)
    forms = {
        "bmm": lambda: torch.bmm(left, right),
        "bmm.out": lambda: torch.bmm(left, right, out=torch.empty(b, m, n)),
        "baddbmm": lambda: torch.baddbmm(total, left, right),
        "baddbmm.out": lambda: torch.baddbmm(total, left, right, out=torch.empty(b, m, n)),
        "baddbmm_": lambda: total.baddbmm_(left, right),
        "addbmm": lambda: torch.addbmm(total[0], left, right),
        "addbmm.out": lambda: torch.addbmm(total[0], left, right, out=torch.empty(m, n)),
        "addbmm_": lambda: total[0].addbmm_(left, right),
    }
    assert {name: flops_of(work) for name, work in forms.items()} == dict.fromkeys(forms, 2 * b * m * k * n)


def test_vector_forms():
    matrix, vector, total = torch.randn(3, 4), torch.randn(4), torch.randn(3)
    forms = {
        "mv": lambda: matrix @ vector,
        "mv.out": lambda: torch.mv(matrix, vector, out=torch.empty(3)),
        "addmv": lambda: torch.addmv(total, matrix, vector),
        "addmv_": lambda: total.addmv_(matrix, vector),
    }
    assert {name: flops_of(work) for name, work in forms.items()} == dict.fromkeys(forms, 24)
    assert flops_of(lambda: vector @ vector) == flops_of(lambda: torch.vdot(vector, vector)) == 8


def test_grouped_products_of_experts_count_each_token_once():
    tokens = torch.randn(32, 16, dtype=torch.bfloat16)
    ends = torch.tensor([8, 32], dtype=torch.int32)
    experts = torch.randn(2, 16, 24, dtype=torch.bfloat16)
    assert flops_of(lambda: torch._grouped_mm(tokens, experts, offs=ends)) == 2 * 32 * 16 * 24
    gradients = torch.randn(32, 24, dtype=torch.bfloat16)
    assert flops_of(lambda: torch._grouped_mm(tokens.T, gradients, offs=ends)) == 2 * 32 * 16 * 24


@pytest.mark.parametrize("key_heads", [4, 2])
def test_fused_attention_on_the_cpu_counts_forward_and_backward(key_heads):
    query = torch.randn(2, 4, 10, 8, requires_grad=True)
    key, value = (torch.randn(2, key_heads, 10, 8, requires_grad=True) for _ in range(2))
    product = 2 * 2 * 4 * 10 * 10 * 8

    with FlopMeter() as meter:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert meter.flops == 2 * product
        out.sum().backward()
    assert meter.flops == (2 + 5) * product  # backward: the scores once more, and two products for each of them


def llama(layers=2, hidden=64, heads=4, key_heads=2, inner=96, vocabulary=160):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
    )
    key_width = hidden * key_heads // heads
    linear = layers * (2 * hidden * hidden + 2 * hidden * key_width + 3 * hidden * inner) + hidden * vocabulary
    return LlamaForCausalLM(config), linear, layers * hidden


def gpt2(layers=2, hidden=64, heads=4, vocabulary=160):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=64)
    return GPT2LMHeadModel(config), layers * 12 * hidden * hidden + hidden * vocabulary, layers * hidden


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_training_step_agrees_with_the_closed_form(make, implementation):
    model, linear_weights, attention_width = make()
    model.set_attn_implementation(implementation)
    # Attention dropout would take another path than the fused one.
    model.eval()
    batch, length = 2, 48
    ids = torch.randint(0, 160, (batch, length))

    linear = 2 * batch * length * linear_weights
    attention = 2 * 2 * batch * length * length * attention_width
    # The backward pass of fused attention recomputes the scores: 5 products for the 2 of the forward pass, else 4.
    attention_backward = attention * (2.5 if implementation == "sdpa" else 2)

    with FlopMeter() as meter:
        loss = model(input_ids=ids, labels=ids).loss
        forward = meter.flops
        loss.backward()
    assert forward == pytest.approx(linear + attention, rel=0.01)
    assert meter.flops - forward == pytest.approx(2 * linear + attention_backward, rel=0.01)


def test_nothing_counts_outside_the_block():
    left = torch.randn(3, 3)
    with FlopMeter() as meter:
        left @ left
    left @ left
    assert meter.flops == 54
