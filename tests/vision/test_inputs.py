"""Unusual pictures and arguments: answered if they have an answer, refused in a sentence if not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import recipe

import zoo
from zoo.cli import run
from zoo.images import open_image
from zoo_registry import errors
from zoo_vision.detection.building import retinanet
from zoo_vision.objects import Found, Objects, pasted, run_lengths
from zoo_vision.pipelines import ImageEmbedding
from zoo_vision.segmentation import Segmentor
from zoo_vision.validation import validate_folder

DIGIT = "examples/digits/digit_7.png"


@pytest.fixture(scope="module")
def pyramid():
    return zoo.create("vmamba_micro", in_chans=3, features_only=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_one_channel_and_with_transparency(channels):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(np.asarray(open_image(grey[..., None], 1)), grey)
    clear = np.zeros((3, 4, 4), dtype=np.uint8)
    assert np.asarray(open_image(clear, channels)).min() == 255


@pytest.mark.parametrize("shape", [(3, 32, 32), (5, 5, 2), (5, 5, 5), (2, 3, 4, 3)])
def test_arrays_of_other_shapes_are_named(shape):
    with pytest.raises(errors.BadArgument, match="array of uint8 and shape"):
        open_image(np.zeros(shape, np.uint8), 3)


def test_pictures_without_pixels_are_named():
    with pytest.raises(errors.BadArgument, match="5 x 0 pixels"):
        open_image(np.zeros((0, 5, 3), np.uint8), 3)


def test_floats_are_stretched_by_their_finite_values():
    values = np.array([[1.0, 2.0, 3.0, np.nan]], dtype=np.float32)
    assert np.asarray(open_image(Image.fromarray(values), 1)).tolist() == [[0, 128, 255, 0]]
    with pytest.raises(errors.BadArgument, match="no finite value"):
        open_image(Image.fromarray(np.full((2, 2), np.nan, np.float32)), 1)


def test_a_header_that_pillow_has_a_valueerror_for(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6\n8\xab 6\n255\n" + bytes(144))
    with pytest.raises(errors.BadArgument, match="not an image"):
        open_image(tmp_path / "a.ppm", 1)
    with pytest.raises(errors.BadFile, match="no picture that can be read"):
        zoo.images.read_picture(tmp_path / "a.ppm")


def test_lab_colours_as_grey(tmp_path):
    Image.new("LAB", (4, 4), (200, 90, 30)).save(tmp_path / "lab.tif")
    colours = open_image(tmp_path / "lab.tif", 3)
    assert open_image(tmp_path / "lab.tif", 1).tobytes() == colours.convert("L").tobytes()


# -- models ----------------------------------------------------------------------------------------------------------


def test_features_are_no_classes():
    with pytest.raises(errors.BadArgument, match="num_classes=0"):
        zoo.pipeline("vim_micro.digits", num_classes=0)
    assert zoo.pipeline("vim_micro.digits", "image-embedding", num_classes=0)(DIGIT).vector.shape == (64,)


@pytest.mark.parametrize("name", ["vmamba_micro_upernet.shapes", "vmamba_micro_mask_rcnn.shapes"])
def test_numbers_of_channels_and_classes_are_checked(name):
    with pytest.raises(errors.BadArgument, match="takes 4 channels"):
        zoo.pipeline(name, in_chans=4)
    for argument in ("in_chans", "num_classes"):
        with pytest.raises(ValueError, match=f"{argument} is 0; expected 1 or more"):
            zoo.load(name, **{argument: 0})
    with pytest.raises(errors.BadArgument, match="short_side is 0"):
        zoo.pipeline(name, short_side=0)


@pytest.mark.parametrize("name", ["vim_micro.digits", "vmamba_micro.digits"])
@pytest.mark.parametrize("size", [0, -4, (32, 0)])
def test_sizes_below_one_are_refused(name, size):
    with pytest.raises(ValueError, match=r"img_size is (0|-4); expected 1 or more"):
        zoo.load(name, img_size=size)


@pytest.mark.parametrize("indices", ["a", 1.5, (1, 1), (0, -4), (0, 1.0), True, [], 0])
def test_indices_of_maps_are_checked(indices):
    # twice the same map: feature_info would say two, and forward give one
    with pytest.raises(ValueError, match=r"feature indices are|feature maps were asked for"):
        zoo.create("vmamba_micro", features_only=True, out_indices=indices)


def test_indices_of_maps_as_numpy_s():
    model = zoo.create("vmamba_micro", features_only=True, out_indices=np.array([3, 1]))
    assert len(model.eval()(torch.rand(1, 1, 32, 32))) == len(model.feature_info.channels()) == 2


def test_prepared_tensors_are_floats_with_pixels():
    pipe = zoo.pipeline("vmamba_micro.digits")
    with pytest.raises(errors.BadArgument, match=r"torch\.uint8 was given; expected floats"):
        pipe(torch.zeros(1, 40, 40, dtype=torch.uint8))
    with pytest.raises(errors.BadArgument, match=r"shape \(1, 0, 40\)"):
        pipe(torch.zeros(1, 0, 40))


def test_sizes_of_numpy_s_are_sizes():
    assert zoo.load("vim_micro.digits", img_size=np.int64(40)).grid_size == (10, 10)


def test_sizes_below_a_patch_are_refused():
    with pytest.raises(ValueError, match="3 x 3 is smaller than a patch, 4 x 4"):
        zoo.load("vim_micro.digits", img_size=3)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("vmamba_micro_upernet.shapes", None),
        ("vmamba_micro_mask_rcnn.shapes", None),
        ("vim_micro.digits", None),
        ("vim_micro.digits", "image-embedding"),
    ],
)
def test_answers_that_are_not_finite_are_errors(name, task):
    pipe = zoo.pipeline(name, task)
    first = next(p for n, p in pipe.model.named_parameters() if "patch_embed" in n)
    with torch.no_grad():
        first.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        pipe(DIGIT)


def test_a_dense_backbone_s_maps_are_finite(pyramid):
    broken = zoo.create("vmamba_micro", features_only=True)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        zoo.pipeline(broken, "image-backbone")(DIGIT)


def test_masks_of_0_and_255_are_refused():
    detector = zoo.create("vmamba_micro_mask_rcnn")
    masks = torch.zeros(1, 64, 64)
    masks[:, 8:40, 8:40] = 255  # a pixel's share of 1/255 would count as the object
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([0]), "masks": masks}
    with pytest.raises(ValueError, match="go from 0 to 255"):
        detector.loss(torch.rand(1, 3, 64, 64), [target])
    detector.loss(torch.rand(1, 3, 64, 64), [target | {"masks": masks.bool()}])


def test_labels_of_pixels_are_checked(pyramid):
    model = Segmentor(pyramid, num_classes=3, head_channels=8, auxiliary_channels=8)
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    for wrong in (3, -1):
        labels[0, 0, 0] = wrong
        with pytest.raises(ValueError, match=f"{wrong}.*expected 0 to 2, or 255"):
            model.loss(torch.rand(2, 3, 32, 32), labels)
    labels[0, 0, 0] = 255
    assert model.loss(torch.rand(2, 3, 32, 32), labels.to(torch.uint8)).isfinite()
    with pytest.raises(ValueError, match="num_classes is 0"):
        retinanet(pyramid, num_classes=0)


def test_images_of_another_shape_and_no_images():
    detector = zoo.create("vmamba_micro_mask_rcnn").eval()
    for shape in ((3, 64, 64), (1, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\)"):
            detector.detect(torch.rand(shape))
        with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\)"):
            detector.loss(torch.rand(shape), [{}] * shape[0])
    assert detector.detect(torch.rand(0, 3, 64, 64)) == []


@pytest.mark.parametrize("name", ["vim_micro.digits", "vmamba_micro_mask_rcnn.shapes"])
def test_what_gives_no_class_for_every_pixel_is_said_at_once(name):
    with pytest.raises(errors.BadArgument, match="a class for every pixel"):
        zoo.pipeline(name, "semantic-segmentation")


def test_run_lengths_of_a_part_are_those_of_the_whole():
    random = np.random.default_rng(0)
    for _ in range(500):
        height, width = random.integers(1, 8, 2)
        h, w = random.integers(0, height + 1), random.integers(0, width + 1)
        top, left = random.integers(0, height - h + 1), random.integers(0, width - w + 1)
        part = random.random((h, w)) < random.choice([0, 0.3, 0.7, 1])
        whole = np.zeros((height, width), dtype=bool)
        whole[top : top + h, left : left + w] = part
        counts = run_lengths(part, (top, left), (height, width))
        values = np.repeat(np.arange(len(counts)) % 2, counts)
        assert np.array_equal(values.reshape(width, height).T, whole)
        assert all(counts[1:])  # a run of none stands at most at the beginning
        assert counts == run_lengths(whole)


def test_objects_at_the_border_and_without_an_area():
    objects = [
        Found(label="a", index=0, score=0.9, box=(8.0, 8.0, 10.5, 10.5)),
        Found(label="a", index=0, score=0.8, box=(10.0, 2.0, 10.0, 5.0)),
        Found(label="a", index=0, score=0.7, box=(-3.0, -2.0, 2.0, 1.0)),
    ]
    found = Objects(objects=objects, size=(10, 10), image=Image.new("RGB", (10, 10)))
    assert [int((found.numbers() == number).sum()) for number in (1, 2, 3)] == [4, 0, 2]
    assert found.picture().size[0] > 10
    mask, corner = pasted(torch.ones(28, 28), torch.tensor([3.0, 3, 3, 9]), (10, 10))
    assert not mask.any()
    assert run_lengths(mask.numpy(), corner, (10, 10)) == [100]


# -- folders of labelled pictures ------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path):
    folder = tmp_path / "labelled" / "7" / "inner"
    folder.mkdir(parents=True)
    image = Image.open(DIGIT).convert("L")
    image.save(folder / "a.png")
    image.save(folder / "b.bmp")
    Image.fromarray(np.asarray(image).astype(np.uint16) * 16).save(folder / "c.tif")  # 12 bits in 16
    return tmp_path / "labelled"


@pytest.mark.parametrize("workers", [0, 1])
def test_all_formats_and_depths_are_measured(labelled, workers):
    found = validate_folder(zoo.load("vim_micro.digits"), labelled, workers=workers)
    assert (found.samples, found.metrics["top1"]) == (3, 1.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_and_no_other_takes_its_place(labelled, workers):
    (labelled / "7" / "d.jpg").write_bytes(b"no picture")
    with pytest.raises(errors.BadArgument, match=r"d\.jpg is not an image"):
        validate_folder(zoo.load("vim_micro.digits"), labelled, workers=workers)


def test_limits_of_folders_are_checked(labelled):
    model = zoo.load("vim_micro.digits")
    for options in ({"limit": 0}, {"batch_size": 0}, {"workers": -1}):
        with pytest.raises(errors.BadArgument, match=f"{next(iter(options))} is"):
            validate_folder(model, labelled, **options)
    with pytest.raises(errors.BadArgument, match="is a file"):
        validate_folder(model, labelled / "7" / "inner" / "a.png")


# -- commands --------------------------------------------------------------------------------------------------------


def test_pictures_of_one_name_stay_apart_in_coco_s_results(tmp_path, capsys):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        Image.open("examples/objects/objects_0.jpg").save(tmp_path / place / "a.png")
    Image.open("examples/objects/objects_1.jpg").save(tmp_path / "one" / "b.png")
    out = tmp_path / "found.json"
    given = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert run(["detect", "vmamba_micro_mask_rcnn.shapes", *given, "--coco", str(out)]) == 0
    names = {row["image_id"] for row in json.loads(out.read_text())}
    assert names == {str(tmp_path / "one" / "a.png"), str(tmp_path / "two" / "a.png"), "b.png"}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("classify vim_micro.digits", ["--csv", "file/a.csv"]),
        ("classify vim_micro.digits", ["--save-picture", "file/a"]),
        ("embed-images vim_micro.digits", ["--out", "file/a.npy"]),
        ("embed-images vim_micro.digits", ["--out", "a.txt"]),
        ("segment-images vmamba_micro_upernet.shapes", ["--out", "file/a"]),
        ("segment-images vmamba_micro_upernet.shapes", ["--out", "a", "--save-picture", "file/a"]),
        ("segment-images vmamba_micro_upernet.shapes", ["--out", "a", "--save-picture", "a"]),
        ("detect vmamba_micro_mask_rcnn.shapes", ["--numbers", "file/a"]),
        ("detect vmamba_micro_mask_rcnn.shapes", ["--numbers", "a", "--save-picture", "./a"]),
    ],
)
def test_places_are_checked_before_anything_is_answered(tmp_path, capsys, monkeypatch, command, options):
    picture = Image.open(DIGIT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    picture.save("digit.png")
    monkeypatch.setattr(zoo, "pipeline", lambda *_, **__: pytest.fail("the model was asked for"))
    assert run([*command.split(), "digit.png", *options]) != 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "error" in said.err.lower()


@pytest.mark.parametrize("name", ["train_digits", "train_segmentor", "train_detector"])
def test_recipes_look_at_their_place_before_they_train(tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("")
    module = recipe("vision", name)
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("it was trained"))
    monkeypatch.setattr("sys.argv", [name, "--out", str(tmp_path / "file" / "a.safetensors")])
    with pytest.raises(errors.StoreError, match="is a file"):
        module.main()


def test_answers_before_a_damaged_file_are_shown(tmp_path, capsys):
    (tmp_path / "damaged.png").write_text("no picture")
    assert run(["classify", "vim_micro.digits", DIGIT, str(tmp_path / "damaged.png")]) != 0
    said = capsys.readouterr()
    assert "digit_7.png: 7" in said.out
    assert "damaged.png" in said.err


def test_tables_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from zoo_vision.pipelines import write_csv, write_embeddings

    answers = ImageEmbedding(zoo.load("vim_micro.digits"))([DIGIT])
    old = tmp_path / "old.npy"
    old.write_text("what was there")
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(answers, old)
    assert old.read_text() == "what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["old.npy"]
    with pytest.raises(errors.StoreError):
        write_csv([], tmp_path)
