"""Saving and loading a model is the identity, in every dtype; a configuration that its weights contradict is refused.

What is damaged is refused: tests/test_damage.py. What a save leaves alone: tests/bayes_dispatch/test_storage.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bayes_dispatch.errors import BundleError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.subwords import SubwordTokenizer, train_subwords
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    MakeModel = Callable[..., MambaFormerForCausalLM]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_round_trip(make_model: "MakeModel", tmp_path: Path, tied: bool, window: int | None) -> None:
    backbone = MambaFormerConfig(d_model=16, n_pairs=1, n_kv_heads=2, d_state=4, head_dim=8, attention_window=window)
    model = make_model(backbone, tie_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    again = MambaFormerForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    assert not again.training
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_that_is_saved_anew_while_it_is_read_is_the_new_one(
    make_model: "MakeModel", tmp_path: Path, meanwhile: Callable[..., None]
) -> None:
    """Its configuration and its weights are of one save."""
    old, new = make_model(), make_model(MambaFormerConfig(d_model=16, n_pairs=1, d_state=4, head_dim=8))
    old.save_pretrained(tmp_path)
    meanwhile("bayes_dispatch.model.mambaformer.pretrained.read_tensors", lambda: new.save_pretrained(tmp_path))
    assert MambaFormerForCausalLM.from_pretrained(tmp_path).fingerprint() == new.fingerprint() != old.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_loaded_in_the_dtype_that_it_was_saved_in(
    make_model: "MakeModel", tmp_path: Path, dtype: torch.dtype
) -> None:
    """Whatever the default is."""
    model, before = make_model(dtype=dtype), torch.get_default_dtype()
    model.save_pretrained(tmp_path / "model")
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            again = MambaFormerForCausalLM.from_pretrained(tmp_path / "model")
        finally:
            torch.set_default_dtype(before)
        assert again.fingerprint() == model.fingerprint()
        assert {t.dtype for t in again.state_dict().values()} == {dtype}


def test_weights_that_bfloat16_holds_take_half_the_bytes(make_model: "MakeModel", tmp_path: Path) -> None:
    """And come back in float32; one that it does not hold leaves all of them whole."""
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    model.bfloat16().float()
    model.save_pretrained(tmp_path / "half")
    whole, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half"))
    assert whole - half > 1.99 * sum(t.numel() for t in model.state_dict().values())  # but for the header
    again = MambaFormerForCausalLM.from_pretrained(tmp_path / "half")
    assert again.fingerprint() == model.fingerprint()
    assert {t.dtype for t in again.state_dict().values()} == {torch.float32}
    with torch.no_grad():
        again.norm.weight[0] += 1e-5
    again.save_pretrained(tmp_path / "half")
    assert (tmp_path / "half" / "model.safetensors").stat().st_size == whole
    assert MambaFormerForCausalLM.from_pretrained(tmp_path / "half").fingerprint() == again.fingerprint()


def test_a_tokenizer_is_kept_beside_the_weights(make_model: "MakeModel", tmp_path: Path) -> None:
    """Without its file there are bytes; one that is missing, edited or too large for the embedding is refused."""
    tokenizer, file = train_subwords(["the other"] * 9, 262), tmp_path / "model" / "tokenizer.json"
    make_model(tokenizer=tokenizer).save_pretrained(tmp_path / "model")
    again = MambaFormerForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(again.tokenizer, SubwordTokenizer)
    assert again.tokenizer.to_json() == tokenizer.to_json() == file.read_bytes()
    assert again.tokenizer.vocab_size == again.vocab_size
    for wrong in (file.read_bytes().replace(b"<pad>", b"<bad>"), None):
        file.unlink() if wrong is None else file.write_bytes(wrong)
        with pytest.raises(BundleError, match=r"tokenizer\.json"):
            MambaFormerForCausalLM.from_pretrained(tmp_path / "model")
    small = make_model()
    small.tokenizer = train_subwords(["the other"] * 9, 270)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected a tokenizer of at most 258 ids"):
        MambaFormerForCausalLM.from_pretrained(tmp_path / "small")
    make_model().save_pretrained(tmp_path / "model")  # in its place
    assert not file.exists()
    assert isinstance(MambaFormerForCausalLM.from_pretrained(tmp_path / "model").tokenizer, ByteTokenizer)


def test_saving_again_replaces(make_model: "MakeModel", tmp_path: Path) -> None:
    for seed in (0, 1):
        model = make_model(seed=seed)
        model.save_pretrained(tmp_path / "model")
        assert MambaFormerForCausalLM.from_pretrained(str(tmp_path / "model")).fingerprint() == model.fingerprint()


class TestDamage:
    @pytest.fixture
    def saved(self, model: MambaFormerForCausalLM, tmp_path: Path) -> Path:
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def refused(self, saved: Path, message: str) -> None:
        with pytest.raises(BundleError, match=message) as error:
            MambaFormerForCausalLM.from_pretrained(saved)
        assert "\n" not in str(error.value)

    def edit(self, saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
        config = json.loads((saved / "config.json").read_text())
        change(config)
        (saved / "config.json").write_text(json.dumps(config))

    def tensors(self, saved: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors, header = read_tensors(saved / "model.safetensors")
        change(tensors)
        write_tensors(saved / "model.safetensors", tensors, header)

    @pytest.mark.parametrize(
        ("name", "value"), [("vocab_size", 0), ("vocab_size", "258"), ("backbone", 3), ("tie_embeddings", "no")]
    )
    @pytest.mark.usefixtures("unchecked")
    def test_a_configuration_out_of_range(self, saved: Path, name: str, value: Any) -> None:
        self.edit(saved, lambda config: config.update({name: value}))
        self.refused(saved, "config.json: expected")

    @pytest.mark.parametrize(
        ("name", "value"),
        [("d_model", 2**20), ("d_model", 2**31), ("expand", 2**31), ("n_pairs", 10**10), ("d_state", 10**100)],
    )
    def test_a_configuration_without_bounds(self, saved: Path, name: str, value: int) -> None:
        """Of a model that has no room: no memory is asked for."""
        self.edit(saved, lambda config: config["backbone"].update({name: value}))
        self.refused(saved, "expected .*, got")

    @pytest.mark.parametrize(("name", "value"), [("d_model", 64), ("n_pairs", 2), ("attention_window", 3)])
    def test_a_configuration_of_another_model(self, saved: Path, name: str, value: int) -> None:
        """The window is of no weight's shape."""
        self.edit(saved, lambda config: config["backbone"].update({name: value}))
        self.refused(saved, "expected .*model.safetensors.*, got")

    def test_a_missing_tensor(self, saved: Path) -> None:
        self.tensors(saved, lambda tensors: tensors.pop("norm.weight"))
        self.refused(saved, "norm.weight")

    def test_a_tensor_too_many(self, saved: Path) -> None:
        self.tensors(saved, lambda tensors: tensors.update(extra=torch.ones(1)))
        self.refused(saved, "extra")

    def test_a_tensor_of_another_shape(self, saved: Path) -> None:
        self.tensors(saved, lambda tensors: tensors.update({"norm.weight": torch.ones(33)}))
        self.refused(saved, r"expected norm.weight of shape \(32,\) .* got \(33,\)")

    def test_a_tensor_of_another_dtype(self, saved: Path) -> None:
        self.tensors(saved, lambda tensors: tensors.update({"norm.weight": torch.ones(32).half()}))
        self.refused(saved, "expected norm.weight .* got .* torch.float16")


def test_a_model_made_in_inference_mode_works(make_model: "MakeModel") -> None:
    with torch.inference_mode():
        model = make_model()
        ids = torch.tensor([[256, 1, 2, 3]])
        cache = model.init_cache(1, 4)
        scales = Adaptation({name: torch.full((rank,), 1.1) for name, rank in model.adaptable().items()})
        parts = [model(part, cache=cache, adaptation=scales).logits for part in ids.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids, adaptation=scales).logits, rtol=0, atol=2e-5)


def test_the_shipped_model_is_what_it_was(tmp_path: Path) -> None:
    """Its fingerprint, predictions, text, and the file that it is saved with: whatever settings there are now."""
    import bayes_dispatch as bd

    bundle = bd.load_bundle()
    model, ids = bundle.model, torch.tensor([ByteTokenizer().encode("kfpa>apfk\nbcde>")])
    assert isinstance(model, MambaFormerForCausalLM)
    assert model.fingerprint() == "8b15ce1ffd25814117ecb5fba3591e89"
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    expected = torch.tensor([8.7223, 8.22277, 8.09354, 5.78692, 5.76229, 5.6307])
    torch.testing.assert_close(logits[[99, 101, 98, 102, 97, 100]], expected, rtol=0, atol=5e-5)
    new = bytes(model.generate(ids, max_new_tokens=24)[0].tolist())
    assert new == b"cdef\npdpd>dpdp\npdpd>dpdp"
    model.save_pretrained(tmp_path / "model")
    shipped = Path(bd.__file__).parent / "shipped" / "model" / "config.json"
    assert (tmp_path / "model" / "config.json").read_bytes() == shipped.read_bytes()
