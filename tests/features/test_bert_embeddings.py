"""Word vectors against a slow plain loop: own windows, one at a time, own averages."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import story_words
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from transformers import BertModel, BertTokenizerFast

from bert_encoding.features.bert_embeddings import embed_layers, embed_stories
from bert_encoding.language_model.encoder import Encoder, weights_fingerprint
from bert_encoding.language_model.windows import tokenize

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LONG = "z" * 20  # 20 word pieces in the tiny vocabulary
STORIES: dict[str, list[str]] = {
    "plain": story_words(90, seed=0),
    "gaps": ["", "the", "", "", *story_words(25, seed=1), "didn't", "", "xylophone", ""],
    "long": ["the", LONG, "house", "hippopotamus", "and", LONG, LONG],
    "one": ["house"],
    "silent": ["", "", ""],
    "repeats": ["the"] * 45,
}
PLAIN = {"plain": STORIES["plain"]}
# window_tokens, stride: one window per story; windows that just touch; much overlap; words longer than a window
WINDOWS = [(512, 256), (32, 30), (32, 7), (8, 3)]


@pytest.fixture(scope="module")
def plain_bert(tiny_bert: Path) -> BertModel:
    return BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).eval()


SETTINGS: dict[str, Any] = {"window_tokens": 32, "stride": 12, "precision": "float32", "device": CPU}


def embed(
    encoder: Encoder, stories: dict[str, list[str]] = STORIES, bert: BertModel | None = None, **changes: Any
) -> dict[str, np.ndarray]:
    tokens = {name: tokenize(words, encoder.tokenizer) for name, words in stories.items()}
    return embed_stories(
        encoder.model.bert if bert is None else bert, tokens, encoder.tokenizer, **({"layer": 2} | SETTINGS | changes)
    )


def plain_vectors(
    words: list[str], bert: BertModel, tokenizer: BertTokenizerFast, layer: int, window_tokens: int, stride: int
) -> np.ndarray:
    """One forward pass per window, no padding; a word's mean inside each window, then the mean of those."""
    pieces = [(piece, index) for index, word in enumerate(words) for piece in tokenizer.tokenize(word)]
    n_inner = window_tokens - 2
    in_windows: list[list[np.ndarray]] = [[] for _ in words]
    start = 0
    while pieces:
        inside = pieces[start : start + n_inner]
        ids = tokenizer.convert_tokens_to_ids(["[CLS]", *(piece for piece, _ in inside), "[SEP]"])
        with torch.no_grad():
            output = bert(torch.tensor([ids]), output_hidden_states=True)
        hidden = output.hidden_states[layer][0, 1:-1].double().numpy()  # (n_inner, n_hidden)
        for word in {index for _, index in inside}:
            in_windows[word].append(
                np.mean([hidden[i] for i, (_, index) in enumerate(inside) if index == word], axis=0)
            )
        if start + n_inner >= len(pieces):
            break
        start += stride
    n_hidden = bert.config.hidden_size
    return np.array([np.mean(vectors, axis=0) if vectors else np.zeros(n_hidden) for vectors in in_windows])


@pytest.mark.table
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("window_tokens", "stride"), WINDOWS)
def test_vectors_equal_a_plain_loop(
    layer: int, window_tokens: int, stride: int, tiny_encoder: Encoder, plain_bert: BertModel
) -> None:
    vectors = embed(tiny_encoder, layer=layer, window_tokens=window_tokens, stride=stride)
    assert list(vectors) == list(STORIES)
    for name, words in STORIES.items():
        expected = plain_vectors(words, plain_bert, tiny_encoder.tokenizer, layer, window_tokens, stride)
        assert vectors[name].dtype == np.float32
        np.testing.assert_allclose(vectors[name], expected, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batch_size_does_not_matter(batch_size: int, tiny_encoder: Encoder) -> None:
    expected = embed(tiny_encoder)
    vectors = embed(tiny_encoder, batch_size=batch_size)
    for name in STORIES:
        np.testing.assert_allclose(vectors[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_same_bits_twice_and_the_model_is_not_modified(tiny_encoder: Encoder) -> None:
    before = weights_fingerprint(tiny_encoder.model)
    tiny_encoder.model.bert.train()  # dropout must not reach the vectors
    first, second = embed(tiny_encoder), embed(tiny_encoder)
    assert all(np.array_equal(first[name], second[name]) for name in STORIES)
    assert weights_fingerprint(tiny_encoder.model) == before


EVERY_PRODUCT = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=EVERY_PRODUCT),
    "dora": LoraConfig(r=4, target_modules=EVERY_PRODUCT, use_dora=True),
    "rslora": LoraConfig(r=4, target_modules=EVERY_PRODUCT, use_rslora=True, bias="lora_only"),
    "ia3": IA3Config(target_modules=["query", "dense"], feedforward_modules=[]),
    "loha": LoHaConfig(r=2, target_modules=["value"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_read_as_if_merged_unless_disabled_and_not_modified(kind: str, tiny_encoder: Encoder) -> None:
    """Against PEFT's own forward pass, with factors that are not zero."""
    model = get_peft_model(tiny_encoder.copy_model(), ADAPTERS[kind])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.3 if kind in ("ia3", "loha") else 0.1) * torch.randn(
                    parameter.shape, generator=generator
                )
    bert, before = model.get_base_model().bert.eval(), weights_fingerprint(model)

    def check() -> np.ndarray:
        vectors = embed(tiny_encoder, PLAIN, bert)["plain"]
        expected = plain_vectors(STORIES["plain"], bert, tiny_encoder.tokenizer, 2, 32, 12)
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-5)
        return vectors

    vectors = check()
    with model.disable_adapter():
        assert np.abs(vectors - check()).max() > 1e-2
    assert weights_fingerprint(model) == before


def test_a_layer_that_is_not_linear_is_refused(tiny_encoder: Encoder) -> None:
    bert = tiny_encoder.copy_model().bert
    bert.encoder.layer[0].output.dense = torch.nn.Identity()
    with pytest.raises(TypeError, match="Identity: neither a linear layer"):
        embed(tiny_encoder, PLAIN, bert)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(precision: str, tiny_encoder: Encoder) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(embed(tiny_encoder, precision=precision))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(result[name], results[0][name]) for result in results for name in STORIES)


def test_no_block_above_the_highest_layer_is_computed(tiny_encoder: Encoder) -> None:
    expected, bert = embed(tiny_encoder, layer=1), tiny_encoder.copy_model().bert
    with torch.no_grad():
        bert.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    vectors = embed(tiny_encoder, bert=bert, layer=1)
    assert all(np.array_equal(vectors[name], expected[name]) for name in STORIES)


def test_products_use_bfloat16_and_sums_from_block_to_block_stay_float32(tiny_encoder: Encoder) -> None:
    """Layer 0 passes no product; the others keep more digits than bfloat16 has."""
    exact, coarse = embed(tiny_encoder)["plain"], embed(tiny_encoder, precision="bfloat16")["plain"]
    assert not np.array_equal(exact, coarse)
    np.testing.assert_allclose(coarse, exact, rtol=0, atol=0.05)
    assert (torch.from_numpy(coarse).bfloat16().float() != torch.from_numpy(coarse)).float().mean() > 0.9
    exact, coarse = embed(tiny_encoder, layer=0), embed(tiny_encoder, layer=0, precision="bfloat16")
    assert all(np.array_equal(exact[name], coarse[name]) for name in STORIES)


def test_vectors_that_are_not_finite_name_the_story(tiny_encoder: Encoder) -> None:
    bert = tiny_encoder.copy_model().bert
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight[tiny_encoder.tokenizer.convert_tokens_to_ids("river")] = float("nan")
    with pytest.raises(RuntimeError, match="story wet: word vectors are not finite"):
        embed(tiny_encoder, {"dry": ["the"], "wet": ["the", "river"]}, bert)


ALL_LAYERS = [0, 1, 2]


def embed_several(encoder: Encoder, layers: list[int], **changes: Any) -> dict[int, dict[str, np.ndarray]]:
    tokens = {name: tokenize(words, encoder.tokenizer) for name, words in STORIES.items()}
    return embed_layers(encoder.model.bert, tokens, encoder.tokenizer, layers=layers, **(SETTINGS | changes))


@pytest.mark.parametrize("layers", [[0], [2], ALL_LAYERS])
def test_layers_together_have_the_bits_of_each_alone(layers: list[int], tiny_encoder: Encoder) -> None:
    vectors = embed_several(tiny_encoder, layers)
    for layer in layers:
        alone = embed(tiny_encoder, layer=layer)
        assert all(np.array_equal(vectors[layer][name], alone[name]) for name in STORIES)


@pytest.mark.parametrize("layers", [(0, 2), (2, 1), (0, 1, 2), (1,)])
def test_mean_of_layers_is_the_mean_of_single_ones(layers: tuple[int, ...], tiny_encoder: Encoder) -> None:
    vectors = embed(tiny_encoder, layer=layers)
    single = embed_several(tiny_encoder, ALL_LAYERS)
    assert list(vectors) == list(STORIES)
    for name in STORIES:
        expected = np.mean([single[layer][name].astype(np.float64) for layer in layers], axis=0)
        assert vectors[name].dtype == np.float32
        np.testing.assert_allclose(vectors[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_all_layers_come_from_one_pass(tiny_encoder: Encoder) -> None:
    """As many forward calls as for one layer, for several and for their mean."""
    batches: list[int] = []
    embeddings = tiny_encoder.model.bert.embeddings
    hook = embeddings.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    try:
        embed(tiny_encoder, batch_size=8)
        single = len(batches)
        embed_several(tiny_encoder, ALL_LAYERS, batch_size=8)
        several = len(batches) - single
        embed(tiny_encoder, layer=(0, 1, 2), batch_size=8)
        mean = len(batches) - single - several
    finally:
        hook.remove()
    n_windows = sum(batches[:single])
    assert n_windows > 8 * (single - 1)  # full batches but for the last
    assert (several, mean) == (single, single)
    assert sum(batches) == 3 * n_windows


def test_stories_come_back_in_their_order_and_own_their_memory(tiny_encoder: Encoder) -> None:
    vectors = embed_several(tiny_encoder, ALL_LAYERS)
    arrays = [vectors[layer][name] for layer in ALL_LAYERS for name in STORIES if len(STORIES[name])]
    assert not any(np.shares_memory(a, b) for index, a in enumerate(arrays) for b in arrays[:index])


@pytest.mark.parametrize(("layer", "message"), [(3, "layer 3: this BERT has"), (-1, "layer -1"), ((), "no layer")])
def test_a_layer_that_is_not_there(layer: Any, message: str, tiny_encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=message):
        embed(tiny_encoder, layer=layer)


def test_a_layer_named_twice(tiny_encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"layers \[1, 2, 1\]: a layer is named twice"):
        embed_several(tiny_encoder, [1, 2, 1])


def test_sums_are_held_only_while_a_story_is_read(tiny_encoder: Encoder) -> None:
    """The float64 sums of 24 stories in three layers would be 6 times what comes back in a single layer."""
    words = story_words(800, seed=0)
    tokens = {f"{index:02d}": tokenize(words, tiny_encoder.tokenizer) for index in range(24)}
    settings = SETTINGS | {"window_tokens": 512, "stride": 256}
    tracemalloc.start()
    try:
        vectors = embed_layers(tiny_encoder.model.bert, tokens, tiny_encoder.tokenizer, layers=ALL_LAYERS, **settings)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    returned = sum(array.nbytes for stories in vectors.values() for array in stories.values())
    assert peak < 2.2 * returned
