"""Importance: what it accepts, how two are merged, and that a file is whole or not there."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mas_fast import importance as importance_module
from mas_fast import storage
from mas_fast.coverage import Coverage, CoverageTable
from mas_fast.importance import Importance

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FIRST = [[1.0, 2.0], [3.0, 4.0]]
SECOND = [[5.0, 0.0], [1.0, 6.0]]


def omega(values=FIRST, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def module_objective(output):
    return output.sum(1)


class CallableObjective:
    def __call__(self, output):
        return output.sum(1)


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


class TestConstruction:
    def test_is_a_mapping_in_the_given_order(self):
        importance = Importance({"b": omega(), "a": omega(SECOND)}, num_samples=3)
        assert list(importance) == ["b", "a"]
        assert len(importance) == 2
        assert "a" in importance and "c" not in importance
        assert torch.equal(importance["a"], omega(SECOND))
        assert importance.num_samples == 3
        assert (importance.objective, importance.statistic, importance.scope) == ("l2_squared", "abs", "global")
        with pytest.raises(KeyError, match="c"):
            importance["c"]

    def test_compares_by_identity(self):
        importance = Importance({"w": omega()}, 1)
        assert importance == importance
        assert importance != Importance({"w": omega()}, 1)
        assert len({importance, importance}) == 1

    @pytest.mark.parametrize(
        "tensor",
        [
            pytest.param(torch.ones(3, 2), id="plain"),
            pytest.param(torch.ones(2, 3).T, id="transposed"),
            pytest.param(torch.ones(1, 2).expand(3, 2), id="expanded"),
            pytest.param(nn.Parameter(torch.ones(3, 2)), id="parameter"),
            pytest.param(torch.ones(3, 2, requires_grad=True) * 1, id="in a graph"),
        ],
    )
    def test_copies_into_contiguous_plain_tensors(self, tensor):
        importance = Importance({"w": tensor}, 1)
        with torch.no_grad():
            tensor[0].fill_(7.0)
        assert torch.equal(importance["w"], torch.ones(3, 2))
        assert importance["w"].is_contiguous()
        assert not importance["w"].requires_grad
        assert type(importance["w"]) is torch.Tensor

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"mapping": [omega()]}, TypeError, "mapping must be a mapping of names to tensors, got list"),
            ({"mapping": {}}, ValueError, "mapping must have at least one tensor, got none"),
            ({"mapping": {1: omega()}}, TypeError, "mapping must have names of type str, got 1"),
            ({"mapping": {"w": [1.0]}}, TypeError, "mapping must have tensors as values, got list for 'w'"),
            ({"mapping": {"w": torch.ones(2, dtype=torch.int64)}}, ValueError, "'w' is of torch.int64: convert it to"),
            ({"mapping": {"w": torch.ones(2, dtype=torch.complex64)}}, ValueError, "'w' is of torch.complex64"),
            ({"mapping": {"w": torch.ones(2).to(torch.float8_e4m3fn)}}, ValueError, "'w' is of torch.float8_e4m3fn"),
            ({"mapping": {"w": torch.ones(2, device="meta")}}, ValueError, "'w' is on the meta device"),
            ({"mapping": {"w": torch.ones(2).to_sparse()}}, ValueError, "'w' is of layout torch.sparse_coo"),
            (
                {"mapping": {"w": omega([[1.0, float("nan")], [float("nan"), 1.0]])}},
                ValueError,
                "'w' has 2 of 4 entries wrong, the first is nan at [0, 1]",
            ),
            (
                {"mapping": {"w": omega([float("inf"), 1.0])}},
                ValueError,
                "1 of 2 entries wrong, the first is inf at [0]",
            ),
            ({"mapping": {"w": omega([1.0, -0.5])}}, ValueError, "1 of 2 entries wrong, the first is -0.5 at [1]"),
            ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
            ({"num_samples": 2.0}, TypeError, "num_samples must be an int, got 2.0"),
            ({"num_samples": True}, TypeError, "num_samples must be an int, got True"),
            ({"objective": 3}, TypeError, "objective must be a name or a callable, got int"),
            ({"statistic": "cube"}, ValueError, "statistic must be one of 'abs', 'square', got 'cube'"),
            ({"scope": "near"}, ValueError, "scope must be one of 'global', 'local', got 'near'"),
            (
                {"coverage": [Coverage("v", "linear", 1)]},
                ValueError,
                "coverage must have rows of parameters in mapping",
            ),
        ],
    )
    def test_refuses(self, change, error, message):
        arguments = {"mapping": {"w": omega()}, "num_samples": 1} | change
        with pytest.raises(error, match=re.escape(message)):
            Importance(**arguments)

    def test_lists_every_bad_tensor(self):
        with pytest.raises(ValueError) as caught:
            Importance({"a": omega([-1.0]), "good": omega(), "b": torch.ones(1, device="meta")}, 1)
        assert "'a'" in str(caught.value) and "'b'" in str(caught.value) and "good" not in str(caught.value)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_accepts_zeros_of_both_signs_scalars_and_empty(self, dtype):
        values = {"zero": torch.tensor([0.0, -0.0]), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3)}
        importance = Importance({name: value.to(dtype) for name, value in values.items()}, 1)
        assert {name: tensor.dtype for name, tensor in importance.items()} == dict.fromkeys(values, dtype)

    @pytest.mark.parametrize(
        ("objective", "recorded"),
        [
            ("l1", "l1"),
            (module_objective, f"{__name__}.module_objective"),
            (CallableObjective(), f"{__name__}.CallableObjective"),
        ],
    )
    def test_records_an_objective_by_name(self, objective, recorded):
        assert Importance({"w": omega()}, 1, objective=objective).objective == recorded


class TestMerge:
    # N1 = 1, N2 = 3, so that the weights of "mean" differ from those of the others.
    @pytest.mark.parametrize(
        ("how", "options", "expected"),
        [
            ("sum", {}, [[6.0, 2.0], [4.0, 10.0]]),
            ("mean", {}, [[4.0, 0.5], [1.5, 5.5]]),
            ("ema", {}, [[3.0, 1.0], [2.0, 5.0]]),
            ("ema", {"alpha": 0.25}, [[2.0, 1.5], [2.5, 4.5]]),
            ("ema", {"alpha": 0}, FIRST),
            ("ema", {"alpha": 1}, SECOND),
            ("max", {}, [[5.0, 2.0], [3.0, 6.0]]),
        ],
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_by_hand(self, how, options, expected, dtype):
        first, second = Importance({"w": omega(FIRST, dtype)}, 1), Importance({"w": omega(SECOND, dtype)}, 3)
        merged = first.merge(second, how, **options)
        assert torch.equal(merged["w"], omega(expected, dtype))
        assert merged["w"].dtype == dtype
        assert merged.num_samples == 4
        assert torch.equal(first["w"], omega(FIRST, dtype)) and first.num_samples == 1
        assert torch.equal(second["w"], omega(SECOND, dtype)) and second.num_samples == 3

    def test_mean_is_one_pass_over_both(self):
        gradients = torch.randn(10, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
        parts = [Importance({"w": part.mean(0)}, len(part)) for part in gradients.split([1, 7, 2])]
        merged = parts[0].merge(parts[1], "mean").merge(parts[2], how="mean")
        torch.testing.assert_close(merged["w"], gradients.mean(0), rtol=1e-14, atol=0)
        assert merged.num_samples == 10

    @pytest.mark.parametrize("how", ["sum", "mean", "ema", "max"])
    def test_half_precision_is_rounded_once(self, how):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.rand(1000, generator=generator).to(torch.bfloat16) for _ in range(2)]
        first, second = (Importance({"w": tensor}, count) for tensor, count in zip(tensors, (3, 7), strict=True))
        wide = first.to(torch.float64).merge(second.to(torch.float64), how, alpha=0.3)
        error = (first.merge(second, how, alpha=0.3)["w"].double() - wide["w"]).abs() / wide["w"]
        # bfloat16 has 8 significant bits; one rounding errs by half a unit of the last.
        assert error.max() <= 2**-8

    @pytest.mark.parametrize(
        ("first", "second", "result"),
        [
            (torch.float32, torch.float64, torch.float64),
            (torch.bfloat16, torch.float32, torch.float32),
            (torch.float16, torch.bfloat16, torch.float32),
        ],
    )
    def test_result_is_of_the_wider_dtype(self, first, second, result):
        merged = Importance({"w": omega(FIRST, first)}, 1).merge(Importance({"w": omega(SECOND, second)}, 1), "sum")
        assert torch.equal(merged["w"], omega([[6.0, 2.0], [4.0, 10.0]], result))
        assert merged["w"].dtype == result

    @pytest.mark.parametrize("how", ["sum", "mean", "ema", "max"])
    def test_shares_no_memory(self, how):
        first, second = Importance({"w": omega()}, 1), Importance({"w": omega(SECOND)}, 1)
        first.merge(second, how, alpha=0.0)["w"].fill_(9.0)
        assert torch.equal(first["w"], omega()) and torch.equal(second["w"], omega(SECOND))

    def test_lists_every_difference(self):
        first = Importance({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, 1)
        second = Importance(
            {"b": torch.ones(4), "c": torch.ones(1), "d": torch.ones(1)},
            1,
            objective="l1",
            statistic="square",
            scope="local",
        )
        with pytest.raises(ValueError) as caught:
            first.merge(second)
        assert str(caught.value).splitlines() == [
            "other must fit this importance, got differences:",
            "  - objective is 'l1' and was 'l2_squared'",
            "  - statistic is 'square' and was 'abs'",
            "  - scope is 'local' and was 'global'",
            "  - 'a' of shape [2] is missing from other",
            "  - 'b' has shape [3], other has [4]",
            "  - 'd' of other is missing from this importance",
        ]

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (({"w": omega()}, "sum"), TypeError, "other must be an Importance, got dict"),
            (
                (Importance({"w": omega()}, 1), "add"),
                ValueError,
                "how must be one of 'sum', 'mean', 'ema', 'max', got 'add'",
            ),
        ],
    )
    def test_refuses(self, arguments, error, message):
        with pytest.raises(error, match=re.escape(message)):
            Importance({"w": omega()}, 1).merge(*arguments)

    @pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
    def test_refuses_alpha_outside_0_to_1(self, alpha):
        with pytest.raises(ValueError, match=f"alpha must be from 0 to 1, got {alpha}"):
            Importance({"w": omega()}, 1).merge(Importance({"w": omega()}, 1), "ema", alpha=alpha)

    def test_refuses_an_overflow(self):
        large = Importance({"w": torch.full((2,), 6e4, dtype=torch.float16)}, 1)
        with pytest.raises(ValueError, match=r"merge\(how='sum'\) must stay finite, got an overflow"):
            large.merge(large)
        assert torch.equal(large.merge(large, "mean")["w"], large["w"])

    def test_joins_coverage(self):
        first = Importance(
            {"w": omega(), "b": omega()}, 1, coverage=[Coverage("w", "linear", 1), Coverage("b", "bias", 1)]
        )
        second = Importance(
            {"w": omega(), "b": omega()}, 1, coverage=[Coverage("w", "loop", 3, "windows"), Coverage("b", "bias", 2)]
        )
        assert first.merge(second).merge(second).coverage == (
            Coverage("w", "linear; loop", 3, "windows"),
            Coverage("b", "bias", 2, None),
        )


class TestTo:
    def test_converts_and_keeps_the_rest(self):
        rows = [Coverage("w", "linear", 1)]
        importance = Importance({"w": omega()}, 5, coverage=rows, objective="l1", statistic="square", scope="local")
        for converted in (importance.to(torch.float64), importance.to("cpu", torch.float64)):
            assert torch.equal(converted["w"], omega(dtype=torch.float64))
            assert converted["w"].dtype == torch.float64
            assert converted.num_samples == 5 and converted.coverage == tuple(rows)
            assert converted.meaning == {"objective": "l1", "statistic": "square", "scope": "local"}
        assert importance["w"].dtype == torch.float32

    def test_copies_even_when_nothing_changes(self):
        importance = Importance({"w": omega()}, 1)
        importance.to("cpu", torch.float32)["w"].zero_()
        assert torch.equal(importance["w"], omega())

    def test_refuses_overflow_and_other_dtypes(self):
        importance = Importance({"w": omega([1e6, 1.0])}, 1)
        with pytest.raises(
            ValueError, match=r"(?s)to\(torch.float16\) must stay finite.*'w' has 1 of 2 .* inf at \[0\]"
        ):
            importance.to(torch.float16)
        with pytest.raises(ValueError, match="dtype must be one of .*, got torch.int32"):
            importance.to(torch.int32)


class TestPrinting:
    def test_coverage_table(self):
        table = CoverageTable(
            [Coverage("fc.weight", "linear", 1), Coverage("scale", "loop", 12, "no rule for aten.cumsum")]
        )
        assert str(table).splitlines() == [
            "parameter  rule    uses  fallback",
            "fc.weight  linear     1",
            "scale      loop      12  no rule for aten.cumsum",
            "2 parameters: 1 by rule, 1 through the loop",
        ]
        assert repr(table) == "<CoverageTable of 2 parameters: 1 by rule, 1 through the loop>"
        assert table[0].name == "fc.weight" and len(table) == 2

    def test_repr(self):
        importance = Importance({"w": omega(), "b": omega([0.5], torch.float64)}, 1200)
        assert repr(importance) == (
            "<Importance of 2 tensors, 5 entries (float32, float64), num_samples=1,200, total=10.5, statistic='abs', "
            "objective='l2_squared', scope='global'>"
        )

    def test_summary(self):
        importance = Importance({"fc.weight": omega([[0.0, 1.0], [0.0, 2.0]]), "none": torch.empty(0)}, 1)
        assert importance.summary().splitlines() == [
            "parameter  shape   mean  max  zeros_%",
            "fc.weight  [2, 2]  0.75    2       50",
            "none       [0]        0    0        0",
        ]


class TestFile:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_round_trip_is_bit_exact(self, dtype, tmp_path):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            "conv.weight": torch.rand(4, 3, 2, generator=generator, dtype=torch.float64).to(dtype),
            "tiny": torch.tensor(
                [torch.finfo(dtype).smallest_normal / 2, 0.0, -0.0, torch.finfo(dtype).max], dtype=dtype
            ),
            "scalar": torch.tensor(3.5, dtype=dtype),
            "empty": torch.empty(0, 3, dtype=dtype),
            "Ωmega.ünïcode": torch.ones(1, dtype=dtype),
        }
        rows = [Coverage("scalar", "loop", 2, 'a "quoted" reason'), Coverage("tiny", "linear", 1)]
        saved = Importance(tensors, 17, coverage=rows, objective=module_objective, statistic="square", scope="local")
        saved.save(tmp_path / "omega.safetensors")
        loaded = Importance.load(tmp_path / "omega.safetensors", expected=tensors)
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == dtype and loaded[name].shape == tensor.shape
            assert torch.equal(bits(loaded[name]), bits(tensor))
        assert loaded.coverage == tuple(rows) and isinstance(loaded.coverage, CoverageTable)
        assert loaded.num_samples == 17 and loaded.meaning == saved.meaning

    def test_header_says_where_it_comes_from(self, tmp_path):
        Importance({"w": omega()}, 3, objective="l1").save(tmp_path / "o")
        with safe_open(tmp_path / "o", framework="pt") as file:
            header = file.metadata()
        assert header["kind"] == "mas_fast.importance" and header["format_version"] == "1"
        assert header["torch_version"] == torch.__version__
        assert header["num_samples"] == "3" and header["objective"] == "l1"
        assert header["statistic"] == "abs" and header["scope"] == "global" and header["coverage"] == "[]"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", header["date"])
        assert header["mas_fast_version"]

    def test_loads_in_a_fresh_process(self, tmp_path):
        Importance({"w": omega()}, 3).save(tmp_path / "o")
        script = (
            "import sys; from mas_fast.importance import Importance; print(Importance.load(sys.argv[1])['w'].tolist())"
        )
        root = str(Path(importance_module.__file__).parents[1])
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "o")],
            env=os.environ | {"PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == str(FIRST)

    def test_does_not_depend_on_the_file_once_loaded(self, tmp_path):
        Importance({"w": torch.ones(5000)}, 1).save(tmp_path / "o")
        loaded = Importance.load(tmp_path / "o")
        with open(tmp_path / "o", "r+b") as file:
            file.write(b"\xff" * (tmp_path / "o").stat().st_size)
        assert torch.equal(loaded["w"], torch.ones(5000))

    def test_writes_shared_and_strided_tensors(self, tmp_path):
        base = torch.arange(12.0)
        tensors = {
            "all": base,
            "part": base[3:7],
            "strided": base.view(3, 4).T,
            "expanded": base[:1].expand(3),
            "twin": base,
        }
        storage.write(tmp_path / "t", "test", tensors, {})
        read, _ = storage.read(tmp_path / "t", "test")
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor)

    @pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("function", ["save_file", "os.fsync", "os.replace"])
    def test_failed_save_leaves_the_old_file(self, function, failure, tmp_path, monkeypatch):
        path = tmp_path / "omega.safetensors"
        Importance({"w": omega()}, 1).save(path)

        def fail(*args, **kwargs):
            if function == "save_file":
                Path(args[1]).write_bytes(b"half of the fi")
            raise failure

        monkeypatch.setattr(f"mas_fast.storage.{function}", fail)
        with pytest.raises(type(failure)):
            Importance({"w": omega(SECOND)}, 2).save(path)
        monkeypatch.undo()
        assert [entry.name for entry in tmp_path.iterdir()] == ["omega.safetensors"]
        assert torch.equal(Importance.load(path)["w"], omega())

    def test_save_names_the_file_that_could_not_be_written(self, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise SafetensorError("no space left")

        monkeypatch.setattr("mas_fast.storage.save_file", fail)
        with pytest.raises(OSError, match="omega' could not be written, an older file is unchanged: no space left"):
            Importance({"w": omega()}, 1).save(tmp_path / "omega")
        assert list(tmp_path.iterdir()) == []

    def test_save_replaces_and_leaves_nothing_else(self, tmp_path):
        path = tmp_path / "omega.safetensors"
        Importance({"w": omega()}, 1).save(path)
        Importance({"w": omega(SECOND)}, 2).save(str(path))
        assert [entry.name for entry in tmp_path.iterdir()] == ["omega.safetensors"]
        assert torch.equal(Importance.load(path)["w"], omega(SECOND))

    def test_save_reaches_the_disk_before_the_name(self, tmp_path, monkeypatch):
        events = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr("mas_fast.storage.os.fsync", lambda fd: (events.append("fsync"), fsync(fd)))
        monkeypatch.setattr("mas_fast.storage.os.replace", lambda *a: (events.append("replace"), replace(*a)))
        Importance({"w": omega()}, 1).save(tmp_path / "o")
        assert events[:2] == ["fsync", "replace"]

    @pytest.mark.skipif(os.name != "posix", reason="permissions and links as POSIX has them")
    def test_save_grants_the_usual_permissions_and_follows_links(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real" / "o")
        mask = os.umask(0o027)
        try:
            Importance({"w": omega()}, 1).save(tmp_path / "link")
        finally:
            os.umask(mask)
        assert (tmp_path / "link").is_symlink()
        assert stat.S_IMODE((tmp_path / "real" / "o").stat().st_mode) == 0o640

    def test_save_needs_the_folder(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match="path must lie in an existing folder, got '.*absent/o': create .*absent"
        ):
            Importance({"w": omega()}, 1).save(tmp_path / "absent" / "o")

    @pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
    def test_load_refuses_a_truncated_file(self, keep, tmp_path):
        path = tmp_path / "omega.safetensors"
        Importance({"w": omega()}, 1).save(path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(
            ValueError, match=r"omega\.safetensors' must be a complete safetensors file, got .*truncated"
        ):
            Importance.load(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                b"not tensors at all, but a text that is long enough to have a header",
                "must be a complete safetensors file",
            ),
            ({}, "must hold mas_fast.importance, got a safetensors file without the header of mas_fast"),
            ({"kind": "mas_fast.mas"}, "must hold mas_fast.importance, got mas_fast.mas"),
            ({"kind": "mas_fast.importance"}, "must have the entry 'format_version', got only ['kind']"),
            (
                {"kind": "mas_fast.importance", "format_version": "2", "mas_fast_version": "9.1"},
                "must have format_version 1, got '2': it was written by mas_fast 9.1; read it with that version",
            ),
            ({"kind": "mas_fast.importance", "format_version": "1"}, "must have the entry 'num_samples'"),
        ],
    )
    def test_load_refuses_a_foreign_file(self, content, message, tmp_path):
        path = tmp_path / "foreign"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file({"w": omega()}, path, metadata=content)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            Importance.load(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        ("values", "change", "message"),
        [
            (omega([-1.0]), {}, "'w' has 1 of 1 entries wrong, the first is -1.0 at [0]"),
            (omega(), {"num_samples": "0"}, "num_samples must be at least 1, got 0"),
            (omega(), {"num_samples": "many"}, "invalid literal for int"),
            (omega(), {"coverage": "[["}, "Expecting value"),
            (omega(), {"coverage": "[[1]]"}, "missing 2 required positional arguments"),
            (omega(), {"statistic": "cube"}, "statistic must be one of 'abs', 'square', got 'cube'"),
        ],
    )
    def test_load_refuses_damaged_contents(self, values, change, message, tmp_path):
        path = tmp_path / "damaged"
        header = {"num_samples": "1", "coverage": "[]", "objective": "l1", "statistic": "abs", "scope": "global"}
        storage.write(path, "mas_fast.importance", {"w": values}, header | change)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            Importance.load(path)
        assert f"{str(path)!r} must hold a valid importance" in str(caught.value)

    def test_load_names_a_missing_file_and_a_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="absent"):
            Importance.load(tmp_path / "absent")
        with pytest.raises(ValueError, match="path must name a file, got the folder"):
            Importance.load(tmp_path)

    def test_load_lists_every_mismatch_with_a_mapping(self, tmp_path):
        path = tmp_path / "o"
        Importance({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, 1).save(path)
        with pytest.raises(ValueError) as caught:
            Importance.load(path, expected={"b": torch.ones(3, 1), "c": torch.ones(1), "d": torch.ones(4)})
        assert str(caught.value).splitlines() == [
            f"{str(path)!r} must fit what is expected, got mismatches:",
            "  - 'a' of shape [2] is missing from expected",
            "  - 'b' has shape [3], expected has [3, 1]",
            "  - 'd' is expected and missing from the file",
        ]

    def test_load_lets_a_module_have_free_parameters(self, tmp_path):
        path = tmp_path / "o"
        Importance({"0.weight": torch.ones(3, 2)}, 1).save(path)
        assert list(Importance.load(path, expected=nn.Sequential(nn.Linear(2, 3)))) == ["0.weight"]
        assert list(Importance.load(path, expected=nn.DataParallel(nn.Sequential(nn.Linear(2, 3))))) == ["0.weight"]
        with pytest.raises(ValueError, match=r"'0.weight' has shape \[3, 2\], the model has \[3, 5\]"):
            Importance.load(path, expected=nn.Sequential(nn.Linear(5, 3)))
