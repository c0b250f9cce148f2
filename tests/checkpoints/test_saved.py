"""One file to go on from: the same bits as without a stop, and nothing of a damaged or foreign one is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import compiled, snapshot, toy, training_step
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qgalore_compile as qg

Parts = tuple[nn.Module, qg.QGaLoreAdamW, torch.optim.lr_scheduler.LRScheduler]


def made(**keys: Any) -> Parts:
    torch.manual_seed(0)
    model, opt = toy(update_proj_gap=2, **keys)
    return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)


def trained(parts: Parts, first: int, last: int, step: Callable[..., Tensor] | None = None) -> list[float]:
    """Losses of some steps, on batches that PyTorch's generator draws."""
    model, opt, scheduler = parts
    step = step or training_step(model, opt)
    losses = []
    for _ in range(first, last):
        losses.append(float(step(torch.randint(17, (4, 9)))))
        scheduler.step()
    return losses


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value.nan_to_num(), expected[name].nan_to_num()), name


@pytest.mark.parametrize("keys", [{}, {"moments": "4bit"}, {"rule": "muon"}], ids=str)
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, keys: dict[str, Any]) -> None:
    parts = made(**keys)
    trained(parts, 0, 3)
    qg.save(tmp_path / "it.safetensors", *parts[:2], scheduler=parts[2], step=3)
    expected = trained(parts, 3, 8)
    again = made(**keys)
    extra = qg.load(tmp_path / "it.safetensors", *again[:2])
    again[2].load_state_dict(extra["scheduler"])
    assert trained(again, extra["step"], 8) == expected
    assert_equal(snapshot(*again[:2]), snapshot(*parts[:2]))


def test_a_compiled_step_goes_on_without_another_compilation(tmp_path: Path) -> None:
    parts = made()
    step, _ = compiled(training_step(*parts[:2]))
    trained(parts, 0, 2, step)
    qg.save(tmp_path / "it.safetensors", *parts[:2], scheduler=parts[2])
    expected = trained(parts, 2, 5, step)
    graphs = counters["stats"]["unique_graphs"]
    parts[2].load_state_dict(qg.load(tmp_path / "it.safetensors", *parts[:2])["scheduler"])
    assert trained(parts, 2, 5, step) == expected
    assert counters["stats"]["unique_graphs"] == graphs


PROGRAM = """
import sys, torch
sys.path[:0] = {path!r}
from test_saved import made, trained
import qgalore_compile as qg
parts = made()
extra = qg.load({file!r}, *parts[:2])
parts[2].load_state_dict(extra["scheduler"])
print([loss.hex() for loss in trained(parts, 3, 6)])
"""


def test_another_process_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    parts = made()
    trained(parts, 0, 3)
    file = str(tmp_path / "it.safetensors")
    qg.save(file, *parts[:2], scheduler=parts[2])
    expected = [loss.hex() for loss in trained(parts, 3, 6)]
    program = PROGRAM.format(path=[str(Path(__file__).parent), *sys.path], file=file)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected)


def test_any_optimizer_and_none_may_be_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 4)).sum().backward()
    opt.step()
    qg.save(tmp_path / "it.safetensors", model, opt)
    qg.save(tmp_path / "alone.safetensors", model)
    for name, optimizer in (("it", torch.optim.AdamW(model.parameters())), ("alone", None)):
        other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        assert qg.load(tmp_path / f"{name}.safetensors", other, optimizer) == {}
        assert all(torch.equal(own, like) for own, like in zip(other.state_dict().values(), model.state_dict().values(),
                                                              strict=True))  # fmt: skip
    with pytest.raises(ValueError, match="holds no optimizer"):
        qg.load(tmp_path / "alone.safetensors", model, opt)


def test_what_wraps_a_model_is_looked_through(tmp_path: Path) -> None:
    model, opt, _ = made()
    qg.save(tmp_path / "it.safetensors", torch.compile(model), opt)
    other, again, _ = made()
    with torch.no_grad():
        for each in other.parameters():
            each.mul_(0.5) if not isinstance(each, qg.Int8Weight) else None
    qg.load(tmp_path / "it.safetensors", torch.compile(other), again)
    assert_equal(snapshot(other, again), snapshot(model, opt))


# -- the file ---------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_told_or_harmless(tmp_path: Path) -> None:
    """Harmless: one in the header's padding, or in a field that says nothing."""
    parts = made()
    path = tmp_path / "it.safetensors"
    qg.save(path, *parts[:2], note="a")
    whole = path.read_bytes()
    before = snapshot(*parts[:2])
    other = made()
    trained(other, 0, 1)
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (60,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        held = snapshot(*other[:2])
        try:
            assert qg.load(path, *other[:2]) == {"note": "a"}
        except ValueError:
            assert_equal(snapshot(*other[:2]), held)
        else:
            assert_equal(snapshot(*other[:2]), before)


@pytest.mark.parametrize("kept", [0, 7, 300, -1])
def test_a_file_that_is_cut_short_is_told(tmp_path: Path, kept: int) -> None:
    parts = made()
    path = tmp_path / "it.safetensors"
    qg.save(path, *parts[:2])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        qg.load(path, *parts[:2])


def test_foreign_and_missing_files_are_told(tmp_path: Path) -> None:
    model, opt, _ = made()
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"is not of qg\.save; of a float checkpoint qg\.load_pretrained"):
        qg.load(tmp_path / "plain.safetensors", model, opt)
    save_file({"w": torch.ones(2)}, tmp_path / "later.safetensors", metadata={"qgalore": "9"})
    with pytest.raises(ValueError, match="is of format 9, and this version reads 1"):
        qg.load(tmp_path / "later.safetensors", model, opt)
    with pytest.raises(ValueError, match="cannot be read"):
        qg.load(tmp_path / "none.safetensors", model, opt)


def test_another_model_or_optimizer_is_told_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    model, opt, _ = made()
    qg.save(path, model, opt)
    small = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="the saved model is another one"):
        qg.load(path, small)
    other, again, _ = made(moments="32bit")
    trained((other, again, torch.optim.lr_scheduler.ConstantLR(again)), 0, 1)
    before = snapshot(other, again)
    with pytest.raises(ValueError, match="saved"):
        qg.load(path, other, again)
    assert_equal(snapshot(other, again), before)
    with pytest.raises(ValueError, match=r"on the meta device: give it memory .* qg\.initialize_"):
        qg.load(path, nn.Linear(3, 3, device="meta"))


def test_what_cannot_be_saved_is_named_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    model, opt, _ = made()
    qg.save(path, model, opt)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="extra/hook is of type function"):
        qg.save(path, model, opt, hook=lambda: None)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["it.safetensors"]


def test_the_file_is_safetensors_with_the_models_own_names(tmp_path: Path) -> None:
    model, opt, _ = made()
    qg.save(tmp_path / "it.safetensors", model, opt)
    with safe_open(tmp_path / "it.safetensors", "pt") as file:
        names = set(file.keys())
    assert {f"model/{name}" for name, each in model.state_dict().items() if not isinstance(each, qg.Int8Weight)} < names
    assert any(name.endswith(".weight/codes") for name in names)


def test_nothing_that_was_loaded_is_the_files_memory(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    model = nn.Linear(4, 4)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    opt.step()
    qg.save(path, model, opt, x=torch.ones(3), same=opt)
    extra = qg.load(path, model, opt)
    state = [value.clone() for each in opt.state.values() for value in each.values()]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(extra["x"], torch.ones(3))
    assert all(torch.equal(value, before) for value, before in
               zip([value for each in opt.state.values() for value in each.values()], state, strict=True))  # fmt: skip
    before = extra["same"]["state"][0]["exp_avg"].clone()
    opt.step()
    assert torch.equal(extra["same"]["state"][0]["exp_avg"], before)


def test_any_amount_of_text_is_read_again(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    qg.save(tmp_path / "it.safetensors", model, text="x" * 100_000_001)
    assert len(qg.load(tmp_path / "it.safetensors", model)["text"]) == 100_000_001


def test_a_model_that_is_tied_does_not_take_one_that_was_not(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    qg.save(path, model)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.clone()
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one tensor here, and were two"):
        qg.load(path, tied)
    assert torch.equal(tied[0].weight, before)
    qg.save(path, tied)
    qg.load(path, tied)


class Versioned(nn.Module):
    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "scale"] = 2 * state[prefix + "scale"]
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_a_modules_version_is_kept(tmp_path: Path) -> None:
    model = nn.Sequential(Versioned())
    qg.save(tmp_path / "it.safetensors", model)
    qg.load(tmp_path / "it.safetensors", model)
    assert torch.equal(model[0].scale, torch.ones(2))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, where a file belongs"):
        qg.save(tmp_path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"is a folder, and qg\.save writes a file"):
        qg.load(tmp_path, nn.Linear(2, 2))
