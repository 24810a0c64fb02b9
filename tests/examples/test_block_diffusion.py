"""The example that makes a block-diffusion model: what it masks, what a block sees, and the checkpoint it writes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import plain_block_diffusion as plain
import quantize_tiny_model as quantize
import train_block_diffusion as example

V, MASK, END = 60, 3, 2


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=END,
        pad_token_id=0,
    )
    config.mask_token_id, config.bd_size = MASK, 4
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [END, 0]
    return model


def text(rows: int, length: int) -> torch.Tensor:
    return torch.randint(MASK + 1, V, (rows, length), generator=torch.Generator().manual_seed(1))


def alone(model, tokens: list[int], block_length: int) -> torch.Tensor:
    """Logits [T, V] of tokens under block-causal attention, nothing beside them, the mask token's barred."""
    place = torch.arange(len(tokens))
    seen = place[None] < (place[:, None] // block_length + 1) * block_length
    logits = model(input_ids=torch.tensor([tokens]), attention_mask=seen[None, None]).logits[0]
    logits[:, MASK] = -math.inf
    return logits


@pytest.mark.parametrize(("length", "block_length", "copies"), [(6, 2, 3), (8, 4, 1), (5, 3, 2), (4, 1, 3)])
def test_a_block_sees_itself_and_the_earlier_clean_blocks(length, block_length, copies):
    seen = plain.seen_by_blocks(length, block_length, copies)
    assert seen.shape == (copies * length, copies * length)
    for query in range(copies * length):
        for key in range(copies * length):
            same_copy, clean = query // length == key // length, key < length
            query_block, key_block = query % length // block_length, key % length // block_length
            expected = (same_copy and query_block == key_block) or (clean and key_block < query_block)
            assert bool(seen[query, key]) is expected


def test_noise_leaves_the_prompt_and_the_blocks_first_tokens_and_masks_each_block_once():
    generator = torch.Generator().manual_seed(2)
    fixed = torch.rand(40, 64, generator=generator) < 0.2
    first, second = example.draw_noise(fixed, 8, generator)
    may_be_masked = ~fixed
    may_be_masked[:, ::8] = False
    assert not ((first | second) & ~may_be_masked).any()
    blocks = [mask.view(-1, 8) for mask in (first, second, may_be_masked)]
    assert torch.equal(blocks[0].sum(1) + blocks[1].sum(1), blocks[2].sum(1))
    complementary = in_order = 0
    for one, other, able in zip(*(block.tolist() for block in blocks), strict=True):
        disjoint = not any(a and b for a, b in zip(one, other, strict=True))
        at_the_end = all(
            copy == sorted(copy)
            for copy in ([m for m, a in zip(mask, able, strict=True) if a] for mask in (one, other))
        )
        assert disjoint or at_the_end
        complementary += disjoint and not at_the_end
        in_order += at_the_end
    assert min(complementary, in_order) > 0.3 * len(blocks[0])
    assert {int(n) for n in blocks[0].sum(1)} == set(range(8))  # every share of masks comes up


def test_the_loss_is_that_of_each_block_run_alone_after_its_clean_beginning(model):
    tokens, fixed = text(2, 12), torch.zeros(2, 12, dtype=torch.bool)
    fixed[1, :6] = True
    with torch.no_grad():
        found = example.block_diffusion_loss(model, tokens, fixed, 4, torch.Generator().manual_seed(3))
        noise = example.draw_noise(fixed, 4, torch.Generator().manual_seed(3))
        losses = []
        for row, clean in enumerate(tokens.tolist()):
            for start in range(0, 12, 4):
                if start and not fixed[row, start]:
                    losses.append(cross_entropy(alone(model, clean[:start], 4)[-1], tokens[row, start]))
                for mask in noise:
                    masked = [p for p in range(start, start + 4) if mask[row, p]]
                    noised = clean[: start + 4]
                    for position in masked:
                        noised[position] = MASK
                    logits = alone(model, noised, 4)
                    losses += [cross_entropy(logits[p - 1], tokens[row, p]) for p in masked]
    assert float(found) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_the_left_to_right_loss_is_that_of_one_token_after_another(model):
    tokens = text(2, 8)
    losses = []
    with torch.no_grad():
        for clean in tokens.tolist():
            for position in range(1, 8):
                so_far = clean[:position] + [MASK] * (-position % 4)
                losses.append(
                    cross_entropy(alone(model, so_far, 4)[position - 1], torch.tensor(clean[position]))
                )
    found = plain.left_to_right_loss(model, tokens, 4)
    assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_one_step_lowers_the_loss_of_its_batch(model):
    tokens, fixed = text(4, 32), torch.zeros(4, 32, dtype=torch.bool)
    optimizers = example.build_optimizers(model)

    def loss() -> torch.Tensor:
        return example.block_diffusion_loss(model, tokens, fixed, 4, torch.Generator().manual_seed(4))

    before = loss()
    before.backward()
    for optimizer, rate in zip(optimizers, example.PEAK_RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    with torch.no_grad():
        assert float(loss()) < float(before) - 0.1


@pytest.mark.parametrize("prompt_tokens", [5, 8])
def test_decoding_in_blocks_of_one_token_is_greedy_decoding(model, prompt_tokens):
    with torch.no_grad():
        model.model.embed_tokens.weight[MASK] = 0  # a logit of 0 is never the greatest here
    prompt = text(1, prompt_tokens)[0].tolist()
    blocks = plain.decode_blocks(model, prompt, 20, 0.9, block_length=1)
    assert blocks == plain.decode_causally(model, prompt, 20)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prompt_tokens", [6, 8])
def test_decoding_accepts_by_the_threshold_and_counts_every_forward(model, prompt_tokens, threshold):
    """With no end token in reach: the answer by the loop written out, one block at a time."""
    model.generation_config.eos_token_id = []
    prompt = text(1, prompt_tokens)[0].tolist()
    found = plain.decode_blocks(model, prompt, 13, threshold, block_length=4)
    tokens, forwards, limit = list(prompt), 0, prompt_tokens + 13
    with torch.no_grad():
        while len(tokens) < limit or MASK in tokens[:limit]:
            if MASK not in tokens and len(tokens) % 4 == 0:
                forwards += len(tokens) > prompt_tokens
                tokens.append(int(alone(model, tokens, 4)[-1].argmax()))
                continue
            tokens += [MASK] * (-len(tokens) % 4)
            best = alone(model, tokens, 4).softmax(-1).max(-1)
            sure = {p: float(best.values[p - 1]) for p, token in enumerate(tokens) if token == MASK}
            for p in [p for p in sure if sure[p] > threshold] or [max(sure, key=sure.get)]:
                tokens[p] = int(best.indices[p - 1])
            forwards += 1
    answer = tokens[prompt_tokens:limit]
    assert found == plain.Completion(answer, forwards, 13 - (prompt_tokens == 8))


@pytest.mark.parametrize("int4", [False, True])
def test_the_checkpoint_has_qwen2_s_names_and_gives_the_llama_s_logits(model, tmp_path, int4):
    example.save_block_model(tmp_path, model, quantize.quantize_plainly(model) if int4 else None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["mask_token_id"], config["bd_size"]) == ("Fast_dLLM_Qwen", MASK, 4)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [END, 0]
    again = example.load_llama(tmp_path)
    assert (again.config.mask_token_id, again.config.bd_size) == (MASK, 4)
    qwen2 = Qwen2ForCausalLM(Qwen2Config.from_dict(config | {"model_type": "qwen2"})).eval()
    tensors = quantize.dequantized_tensors(tmp_path)
    missing, unexpected = qwen2.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    tokens = text(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(qwen2(input_ids=tokens).logits, again(input_ids=tokens).logits)
    for (name, weight), read in zip(model.named_parameters(), again.parameters(), strict=True):
        span = float(weight.detach().max() - weight.detach().min())
        step = span / 15 if int4 and name.endswith("_proj.weight") else span * 2**-10  # float16 has 11 bits
        assert float((read - weight).detach().abs().max()) <= 0.55 * step, name


def test_a_bias_that_is_not_zero_is_no_llama(model, tmp_path):
    example.save_block_model(tmp_path, model)
    tensors = quantize.dequantized_tensors(tmp_path)
    tensors["model.layers.0.self_attn.q_proj.bias"][0] = 1
    quantize.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.bias is not zero"):
        example.load_llama(tmp_path)
