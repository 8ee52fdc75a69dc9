"""Volumes, flat maps and pictures against plain loops; bad input is refused in one line."""

import gzip
import sys
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse
from matplotlib import colormaps
from matplotlib.image import imread
from run_commands import refusal, run_command
from scipy.ndimage import gaussian_filter

from bert_encoding.analyses.brain_maps.flatmap import Mapper, flatten, read_mapper
from bert_encoding.analyses.brain_maps.pictures import SEQUENTIAL, draw, paint, scale
from bert_encoding.analyses.brain_maps.values import GREY, Values, check_values, read_array, read_trial
from bert_encoding.analyses.brain_maps.volumes import Mask, doubt_order, read_mask, slices
from bert_encoding.core.errors import InputError

SHAPE = (5, 4, 3)  # x, y, z
HUGE = object()  # for an array that claims to be larger than memory
AFFINE = np.array([[-2.0, 0, 0, 11], [0, 2.5, 0, -7], [0, 0, 3.0, 5], [0, 0, 0, 1]])

run = partial(run_command, "map")


@pytest.fixture
def inside() -> np.ndarray:
    """An asymmetric mask as nibabel has it, (x, y, z)."""
    return np.random.default_rng(3).random(SHAPE) < 0.4


@pytest.fixture
def mask_file(tmp_path: Path, inside: np.ndarray) -> str:
    nibabel = pytest.importorskip("nibabel")
    file = tmp_path / "mask_thick.nii.gz"
    nibabel.Nifti1Image(inside.astype(np.uint8), AFFINE).to_filename(file)
    return str(file)


@pytest.fixture
def values(inside: np.ndarray) -> np.ndarray:
    cc = np.random.default_rng(4).uniform(-0.1, 0.5, np.count_nonzero(inside))
    cc[2] = np.nan
    return cc.astype(np.float32)


@pytest.fixture
def study(tmp_path: Path, values: np.ndarray) -> Path:
    for name, cc in {"0001": values, "baseline-frozen": values - np.linspace(-0.1, 0.2, values.size)}.items():
        folder = tmp_path / "study" / "trials" / name
        folder.mkdir(parents=True)
        arrays = {"UTS03": cc, "test/UTS03": cc + 0.25}
        np.savez(folder / "cc.npz", **(arrays | {"UTS01": cc[:3]} if name == "0001" else arrays))
    return tmp_path / "study"


def expected_volume(inside: np.ndarray, values: np.ndarray, order: str) -> np.ndarray:
    """Place one value after the other, (x, y, z)."""
    volume = np.full(inside.shape, np.nan)
    places = sorted(zip(*np.nonzero(inside), strict=True), key=lambda place: place[::-1] if order == "zyx" else place)
    for place, value in zip(places, values, strict=True):
        volume[place] = value
    return volume


def write_mapper(file: Path, **changes: Any) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write a mapper of 6 voxels to 7 of 4 x 3 pixels, and return it with its dense weights and its mask."""
    rng = np.random.default_rng(5)
    inside = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], bool)  # (width, height)
    dense = rng.random((7, 6)) * (rng.random((7, 6)) < 0.6)
    dense[4] = 0  # a pixel without a voxel
    dense[[0, 1, 2, 3, 5, 6]] /= dense[[0, 1, 2, 3, 5, 6]].sum(axis=1, keepdims=True)
    sparse = scipy.sparse.csr_matrix(dense)
    content = {f"voxel_to_flatmap_{part}": getattr(sparse, part) for part in ("data", "indices", "indptr", "shape")}
    content |= {"flatmap_mask": inside, "flatmap_curvature": np.where(inside, rng.random(inside.shape), np.nan)}
    with h5py.File(file, "w") as out:
        for name, array in (content | changes).items():
            if array is HUGE:
                out.create_dataset(name, shape=(2**40,), dtype="f4", chunks=(1024,))
            elif array is not None:
                out[name] = array
    return file, dense, inside


@pytest.mark.parametrize("order", ["zyx", "xyz"])
def test_nifti_holds_each_voxel_at_its_position_and_is_reproducible(
    study: Path, mask_file: str, inside: np.ndarray, values: np.ndarray, order: str, tmp_path: Path
) -> None:
    nibabel = pytest.importorskip("nibabel")
    to = tmp_path / "cc.nii.gz"
    order_option = () if order == "zyx" else ("--order", order)
    options = (study, "--trial", "0001", "--subject", "UTS03", "--mask", mask_file, *order_option)
    assert run(*options, "--to", to) == 0
    image = nibabel.load(to)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.affine, AFFINE)
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected_volume(inside, values, order).astype(np.float32))
    assert b"trial 0001, UTS03" in image.header["descrip"].tobytes()
    again = tmp_path / "again.nii.gz"
    run(*options, "--to", again)
    assert again.read_bytes() == to.read_bytes()


def test_axes_of_an_array_mask_are_in_the_given_order(tmp_path: Path, inside: np.ndarray, values: np.ndarray) -> None:
    nibabel = pytest.importorskip("nibabel")
    np.save(tmp_path / "mask.npy", inside.T)
    np.savez(tmp_path / "values.npz", unique=values, other=values)
    options = ("--array", f"{tmp_path / 'values.npz'}:unique", "--to", str(tmp_path / "map.nii"))
    assert run(*options, "--mask", tmp_path / "mask.npy") == 0
    image = nibabel.load(tmp_path / "map.nii")
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected_volume(inside, values, "zyx").astype(np.float32))
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (0, 0), "no space is claimed"


def test_only_the_wrong_order_is_doubted() -> None:
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.standard_normal((14, 20, 17)), 1.5)
    inside = gaussian_filter(rng.standard_normal(smooth.shape), 2) > 0
    mask = Mask(inside.T, "zyx")
    assert doubt_order(smooth.T[inside.T], mask) == ""
    assert "--order xyz" in doubt_order(smooth[inside], mask)
    assert "--order zyx" in doubt_order(smooth.T[inside.T], Mask(inside, "xyz"))
    for _ in range(5):
        assert doubt_order(rng.standard_normal(np.count_nonzero(inside)), mask) == "", "noise has no order"


def test_slices_are_next_to_each_other(inside: np.ndarray, values: np.ndarray) -> None:
    """Without an affine: slices of z, y upwards, x to the right; one row of NaN below and one column right of each."""
    mask = Mask(inside.T, "zyx")
    volume = expected_volume(inside, values, "zyx")
    image, background = slices(volume, mask)
    n_x, n_y, _ = SHAPE
    n_columns = 3  # ceil(sqrt(1.5 * 3))
    expected = np.full((n_y + 1, n_columns * (n_x + 1)), np.nan)
    shade = expected.copy()
    for x, y, z in np.argwhere(inside):
        expected[n_y - 1 - y, z * (n_x + 1) + x] = volume[x, y, z]
        shade[n_y - 1 - y, z * (n_x + 1) + x] = GREY
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(background, shade)


def test_slices_show_the_left_on_the_left(inside: np.ndarray, values: np.ndarray) -> None:
    """An affine with x from right to left mirrors the array."""
    pytest.importorskip("nibabel")
    volume = expected_volume(inside, values, "zyx")
    image, _ = slices(volume, Mask(inside.T, "zyx", AFFINE, 1))
    turned, _ = slices(volume[::-1], Mask(inside[::-1].T, "zyx"))
    np.testing.assert_array_equal(image, turned)


def test_flat_image_equals_the_dense_product(tmp_path: Path) -> None:
    file, dense, inside = write_mapper(tmp_path / "mapper.hdf")
    values = np.random.default_rng(6).standard_normal(6)
    image, background = flatten(values, read_mapper(file))
    expected = np.full((3, 4), np.nan)  # (height, width), the first row at the top
    for pixel, (x, y) in enumerate(np.argwhere(inside)):
        if pixel != 4:
            expected[3 - 1 - y, x] = dense[pixel] @ values
    np.testing.assert_allclose(image, expected, atol=1e-14)
    np.testing.assert_array_equal(np.isfinite(background), inside.T[::-1])
    np.testing.assert_allclose([np.nanmin(background), np.nanmax(background)], [0.5, 0.9])
    with pytest.raises(InputError, match=r"mapper\.hdf: maps 6 voxels, but there are 5 values"):
        flatten(np.ones(5), read_mapper(file), str(file))


def test_voxels_without_a_value_are_left_out() -> None:
    weights = scipy.sparse.csr_matrix([[0.75, 0.25, 0], [0.25, 0.75, 0], [0.5, 0, 0.5], [0, 1, 0]])
    mapper = Mapper(weights, np.ones((4, 1), bool))
    image, _ = flatten(np.array([2.0, np.nan, 4.0]), mapper)
    np.testing.assert_allclose(image, [[2.0, np.nan, 3.0, np.nan]], atol=1e-14)


def test_colours_follow_the_values() -> None:
    image = np.array([[0.0, 1.0, np.nan], [0.5, 9.0, np.nan]])
    background = np.array([[0.7, 0.7, 0.5], [0.7, 0.7, np.nan]])
    painted = paint(image, background, (0.0, 1.0), SEQUENTIAL)
    ramp = colormaps[SEQUENTIAL]
    over = {value: 0.8 * np.array(ramp(value)[:3]) + 0.2 * 0.7 for value in (0.0, 0.5, 1.0)}
    expected = [[over[0.0], over[1.0], [0.5] * 3], [over[0.5], over[1.0], [1.0] * 3]]
    np.testing.assert_allclose(painted, expected, atol=1e-12)


def test_colour_scales_start_at_0_or_are_symmetric() -> None:
    low, high = scale(Values(np.array([-0.3, 0.1, np.nan]), "", "", "", is_difference=True))
    assert low == -high == pytest.approx(-0.299)
    assert scale(Values(np.array([-0.3, 0.2]), "", "CC", ""))[0] == 0
    assert scale(Values(np.zeros(3), "", "CC", "")) == (0, 1), "no scale without width"


def test_picture_has_one_square_per_pixel(tmp_path: Path) -> None:
    image = np.array([[0.0, 1.0, np.nan], [0.5, np.nan, 0.25]])
    background = np.array([[0.7, 0.7, 0.6], [0.7, np.nan, 0.7]])
    voxels = Values(np.array([0.0, 1.0, 0.5, 0.25]), "title $x", "CC_a$", "", is_cc=True)
    draw(image, background, voxels, tmp_path / "map.png", ".png")
    picture = imread(tmp_path / "map.png")
    size = -(-640 // 3)
    assert picture.shape[:2] == (40 + 2 * size + 88, 3 * size)
    painted = paint(image, background, scale(voxels), SEQUENTIAL)
    squares = picture[40 : 40 + 2 * size, :, :3].reshape(2, size, 3, size, 3)
    expected = np.broadcast_to(painted[:, None, :, None], squares.shape)
    np.testing.assert_allclose(squares, expected, atol=1 / 255)
    assert len(np.unique(picture[40 + 2 * size :, :, :3].reshape(-1, 3), axis=0)) > 100, "the colour bar"


@pytest.mark.parametrize(("ending", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_command_draws_reproducible_pictures(values: np.ndarray, tmp_path: Path, ending: str, start: bytes) -> None:
    file, *_ = write_mapper(tmp_path / "mapper.hdf")
    np.save(tmp_path / "six.npy", values[3:9])
    to = tmp_path / f"flat{ending}"
    assert run("--array", tmp_path / "six.npy", "--mapper", file, "--to", to) == 0
    content = to.read_bytes()
    assert content.startswith(start) and len(content) > 1000
    again = tmp_path / f"again{ending}"
    assert run("--array", tmp_path / "six.npy", "--mapper", file, "--to", again) == 0
    assert again.read_bytes() == content, "the same map gives the same file"


def test_difference_to_the_baseline(
    study: Path, mask_file: str, values: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("--trial", "0001", "--minus", "baseline-frozen", "--subject", "UTS03", "--mask", mask_file)
    assert run(study, *both, "--test", "--mosaic") == 0
    file = study / "maps" / "0001-minus-baseline-frozen-UTS03-test.png"
    assert len(np.unique(imread(file).reshape(-1, 4), axis=0)) > 10
    out = capsys.readouterr().out
    known = np.linspace(-0.1, 0.2, values.size)[np.isfinite(values)]
    assert f"mean {known.mean():+.4f}, above 0 in {(known > 0).mean():.1%}" in out
    assert str(file) in out
    difference = read_trial(study, "0001", "UTS03", minus="baseline-frozen")
    np.testing.assert_allclose(difference.values[np.isfinite(values)], known, atol=1e-6)
    assert run(study, "--trial", "baseline-frozen", "--mask", mask_file) == 0
    assert (study / "maps" / "baseline-frozen-UTS03.nii.gz").is_file(), "the only subject is the default"


def test_an_existing_map_is_not_overwritten(study: Path, mask_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for to in ((), ("--to", str(study / "mine.nii"))):
        options = (str(study), "--trial", "baseline-frozen", "--mask", mask_file, *to)
        assert run(*options) == 0
        file = Path(capsys.readouterr().out.splitlines()[-1])
        file.write_text("precious")
        assert f"{file}: exists already" in refusal(capsys, "map", *options)
        assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("STUDY --trial 0001 --subject UTS03", "give --mask FILE or --mapper FILE"),
        ("STUDY --trial 0001 --subject UTS03 --mask MASK --mapper MASK", "one of the two"),
        ("STUDY --trial 0001 --mask MASK", "choose one, as in --subject UTS01"),
        ("STUDY --trial 0001 --subject UTS09 --mask MASK", "no subject UTS09; it holds UTS01, UTS03"),
        ("STUDY --trial 0009 --mask MASK", "trials with CC are 0001, baseline-frozen"),
        (
            "STUDY --trial .. --mask MASK",
            "--trial '..': not the name of a trial; trials with CC are 0001, baseline-frozen",
        ),
        ("STUDY --trial ../trials/0001 --mask MASK", "--trial '../trials/0001': not the name of a trial"),
        (
            "STUDY --trial 0001 --subject UTS03 --minus ../0001 --mask MASK",
            "--minus '../0001': not the name of a trial",
        ),
        ("STUDY/nowhere --trial 0001 --mask MASK", "is it a study?"),
        ("STUDY --subject UTS03 --mask MASK", "--trial ID"),
        ("STUDY --trial 0001 --subject UTS01 --mask MASK", "voxels, but there are 3 values"),
        ("STUDY --trial 0001 --subject UTS03 --mask MASK --order yxz", "give zyx or xyz"),
        ("STUDY --trial 0001 --subject UTS03 --mask MASK --to x.gif", "ends in .nii.gz"),
        ("STUDY --trial 0001 --subject UTS03 --mask MASK --mosaic --to x.nii.gz", "ends in .png"),
        ("STUDY --trial 0001 --subject UTS03 --mask MASK --to MASK", "is an input file"),
        ("STUDY --trial 0001 --subject UTS03 --mask MASK --to no/where.png", "no such folder"),
        ("STUDY --trial 0001 --subject UTS03 --mapper MASK --order zyx", "options of --mask"),
        ("STUDY --trial 0001 --subject UTS03 --mapper MASK", "not a readable HDF5 file"),
        ("STUDY --trial 0001 --subject UTS03 --mask STUDY/none.nii.gz", "no such file"),
        ("STUDY --array STUDY/none.npy --mask MASK --to x.png", "--array replaces the study"),
        ("--array STUDY/none.npy --mask MASK", "name the output file"),
        ("--array STUDY/none.npy --mask MASK --to x.png", "none.npy: no such file"),
    ],
)
def test_mistakes_are_one_line(
    study: Path, mask_file: str, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(mask_file).read_bytes()
    words = [word.replace("STUDY", str(study)).replace("MASK", mask_file) for word in arguments.split()]
    assert message in refusal(capsys, "map", *words)
    assert Path(mask_file).read_bytes() == before


def test_another_number_of_voxels_and_a_damaged_file_are_refused(study: Path) -> None:
    np.savez(study / "trials" / "baseline-frozen" / "cc.npz", UTS03=np.ones(4))
    with pytest.raises(InputError, match=r"--minus baseline-frozen: it has 4 voxels of UTS03, trial 0001 has \d+"):
        read_trial(study, "0001", "UTS03", minus="baseline-frozen")
    (study / "trials" / "baseline-frozen" / "cc.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match=r"cc\.npz: not a readable"):
        read_trial(study, "baseline-frozen", "UTS03")


@pytest.mark.parametrize("damage", ["cut", "noise", "huge"])
def test_damaged_nifti_is_one_line(mask_file: str, damage: str) -> None:
    content = bytearray(gzip.decompress(Path(mask_file).read_bytes()))
    huge = content[:42] + np.array([30000, 30000, 30000], "<i2").tobytes() + content[48:]  # dim[1:4]
    damages = {"cut": gzip.compress(content[:360]), "noise": b"noise" * 90, "huge": gzip.compress(huge)}
    Path(mask_file).write_bytes(damages[damage])
    with pytest.raises(InputError, match=r"mask_thick\.nii\.gz: (not a readable NIfTI file|its header says)"):
        read_mask(mask_file, "zyx")


@pytest.mark.parametrize(
    ("read", "array", "message"),
    [
        (read_mask, np.ones(3), "three axes"),
        (read_mask, np.zeros((2, 2, 2)), "no voxel inside"),
        (read_mask, np.full((2, 2, 2), np.nan), "not finite"),
        (read_mask, np.full((2, 2, 2), "a"), "three axes"),
        (check_values, np.ones((2, 2)), "one number per voxel"),
        (check_values, np.array([np.inf, 1]), "1 values are infinite"),
        (check_values, np.array([np.nan, np.nan]), "nothing to draw"),
    ],
)
def test_a_bad_mask_or_array_is_refused(tmp_path: Path, read: Any, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "array.npy", array)
    with pytest.raises(InputError, match=message):
        read(array, "x") if read is check_values else read(str(tmp_path / "array.npy"), "zyx")


def test_bad_array_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.ones(3), b=np.ones((2, 2)))
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00\x76\x00{'descr'")
    assert read_array(f"{tmp_path / 'two.npz'}:a")[1] == "a"
    for name, message in (
        ("two.npz", "holds several arrays; name one"),
        ("two.npz:c", "holds no 'c'"),
        ("bad.npy", r"not a readable \.npy"),
    ):
        with pytest.raises(InputError, match=message):
            read_array(str(tmp_path / name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"voxel_to_flatmap_indices": None}, "no data set 'voxel_to_flatmap_indices'"),
        ({"voxel_to_flatmap_indices": np.full(26, 99)}, "not a sparse matrix"),
        ({"voxel_to_flatmap_indptr": np.zeros(3, int)}, "not a sparse matrix"),
        ({"voxel_to_flatmap_shape": np.array([7, 6, 1])}, "not a sparse matrix"),
        ({"voxel_to_flatmap_shape": np.array([7, -6])}, "not a sparse matrix"),
        ({"voxel_to_flatmap_data": "text"}, "expected numbers"),
        ({"voxel_to_flatmap_data": HUGE}, "expected numbers, at most"),
        ({"flatmap_mask": np.ones((2, 2), bool)}, "has 4 pixels, voxel_to_flatmap 7"),
        ({"flatmap_curvature": np.ones((2, 2))}, r"flatmap_curvature is \(2, 2\)"),
        ({"flatmap_curvature": h5py.ExternalLink("/etc/passwd", "x")}, "not followed"),
        ({"flatmap_mask": h5py.SoftLink("/elsewhere")}, "not followed"),
    ],
)
def test_damaged_mapper_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file, *_ = write_mapper(tmp_path / "mapper.hdf", **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_mapper(file)
    assert "\n" not in str(caught.value) and "mapper.hdf" in str(caught.value)


def test_without_nibabel(
    study: Path, mask_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    message = refusal(capsys, "map", study, "--trial", "baseline-frozen", "--mask", mask_file)
    assert "pip install 'bert-encoding-study[maps]'" in message
