"""Pictures, read back pixel by pixel."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from functorch_gen import plot, random

MARGIN, GAP = 12, 2


def uniform(*shape):
    return random.uniform(random.key(0), shape, minval=-1.2, maxval=1.2)


def read(path):
    return np.asarray(Image.open(path))


def expected_pixels(image, low=-1.0, high=1.0):
    """(c, h, w) -> (h, w, 3) by plain arithmetic."""
    unit = np.clip((image.numpy() - low) / (high - low), 0, 1)
    return np.broadcast_to(np.round(255 * unit).astype(np.uint8).transpose(1, 2, 0), (*image.shape[1:], 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 3])
def test_image_grid_holds_every_pixel(tmp_path, channels, scale):
    images = uniform(6, channels, 4, 5)
    sheet = read(plot.image_grid(images, tmp_path / "grid.png", rows=2, columns=3, scale=scale))
    assert sheet.shape == (2 * MARGIN + 8 * scale + GAP, 2 * MARGIN + 15 * scale + 2 * GAP, 3)
    covered = np.zeros(sheet.shape[:2], dtype=bool)
    for i, image in enumerate(images):
        top = MARGIN + (i // 3) * (4 * scale + GAP)
        left = MARGIN + (i % 3) * (5 * scale + GAP)
        cell = np.s_[top : top + 4 * scale, left : left + 5 * scale]
        assert np.array_equal(sheet[cell], np.kron(expected_pixels(image), np.ones((scale, scale, 1), np.uint8)))
        covered[cell] = True
    assert (sheet[~covered] == 255).all()


def test_image_grid_maps_the_value_range_to_black_and_white(tmp_path):
    images = torch.tensor([0.0, 2.0, 4.0, 16.0, 20.0, -1.0]).reshape(6, 1, 1, 1)
    sheet = read(plot.image_grid(images, tmp_path / "grid.png", columns=6, value_range=(0, 16), scale=1))
    row = sheet[MARGIN, MARGIN :: 1 + GAP, 0][:6]
    assert row.tolist() == [0, 32, 64, 255, 255, 0]


@pytest.mark.parametrize(("n", "rows", "columns"), [(10, 3, 4), (9, 3, 3), (1, 1, 1), (5, 2, 3)])
def test_image_grid_is_square_by_default(tmp_path, n, rows, columns):
    sheet = read(plot.image_grid(-torch.ones(n, 1, 6, 6), tmp_path / "grid.png", scale=1))
    assert sheet.shape[:2] == (2 * MARGIN + rows * 8 - GAP, 2 * MARGIN + columns * 8 - GAP)
    assert (sheet == 0).all(axis=-1).sum() == n * 36


def test_image_grid_enlarges_small_images(tmp_path):
    sheet = read(plot.image_grid(-torch.ones(1, 1, 8, 8), tmp_path / "grid.png"))
    assert sheet.shape[:2] == (2 * MARGIN + 56, 2 * MARGIN + 56)


def test_image_grid_labels_leave_the_pixels_as_they_are(tmp_path):
    images = uniform(4, 3, 20, 20)
    plain = read(plot.image_grid(images, tmp_path / "plain.png", columns=2, scale=1))[MARGIN:-MARGIN, MARGIN:-MARGIN]
    options = {"row_labels": ["first", "2"], "column_labels": ["a", "b"], "title": "A title longer than the grid"}
    sheet = read(plot.image_grid(images, tmp_path / "grid.png", columns=2, scale=1, **options))
    height, width = plain.shape[:2]
    left = next(
        x for x in range(sheet.shape[1]) if np.array_equal(sheet[-MARGIN - height : -MARGIN, x : x + width], plain)
    )
    label_area, title_area = sheet[-MARGIN - height : -MARGIN, :left], sheet[: -MARGIN - height]
    assert (label_area < 100).any()
    assert (title_area < 100).any()
    assert (sheet[:, -MARGIN:] == 255).all()  # nothing runs over the edge


def test_image_path_shows_evenly_spaced_steps(tmp_path):
    """11 steps in 6 columns: every second one; step s of sample n has the grey value 20 s + n."""
    steps, samples = 11, 3
    values = 20 * torch.arange(steps).reshape(steps, 1) + torch.arange(samples)
    images = (values / 255).reshape(steps, samples, 1, 1, 1).expand(-1, -1, 1, 4, 4)
    sheet = read(plot.image_path(images, tmp_path / "path.png", columns=6, value_range=(0, 1), scale=1))
    cells = sheet[MARGIN:-MARGIN:6, MARGIN:-MARGIN:6, 0]
    assert cells.tolist() == [[40 * k + n for k in range(6)] for n in range(samples)]


def test_image_path_writes_its_times(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("functorch_gen.plot.images.image_grid", lambda images, path, **options: drawn.update(options))
    times = torch.linspace(1, 0, 5)
    plot.image_path(torch.zeros(5, 1, 1, 2, 2), tmp_path / "path.png", times=times, columns=3)
    assert drawn["column_labels"] == ["t = 1.00", "t = 0.50", "t = 0.00"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to look inside."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), save(self, *args, **kw))[1])
    return saved


def test_curve_draws_values_and_moving_average(tmp_path, figures):
    values, steps = torch.rand(20, generator=torch.Generator().manual_seed(0)) + 0.1, torch.arange(20) * 3
    options = {"title": "Loss", "x_label": "n", "y_label": "nats"}
    path = plot.curve(values, tmp_path / "loss.png", steps=steps, window=5, **options)
    assert read(path).shape[:2] == (600, 1050)
    (axes,) = figures[0].axes
    each, average = axes.lines
    assert np.array_equal(each.get_xdata(), steps.numpy())
    assert np.array_equal(each.get_ydata(), values.double().numpy())
    windows = [values[max(0, i - 2) : i + 3].double().mean().item() for i in range(20)]
    assert average.get_ydata().tolist() == pytest.approx(windows, rel=1e-12)
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Loss", "n", "nats")
    assert axes.get_yscale() == "log"


def test_curve_of_few_values_draws_no_average(tmp_path, figures):
    plot.curve([3.0, -2.0, 1.0], tmp_path / "loss.png", log=False)
    (axes,) = figures[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3.0, -2.0, 1.0]]
    assert axes.get_yscale() == "linear"


def test_curves_draws_each_by_its_name(tmp_path, figures):
    values = {"sgd": [4.0, 2.0, 1.0], "adam": torch.tensor([3.0, 0.5])}
    plot.curves(values, tmp_path / "race.png", title="Race", x_label="n", y_label="nats")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines}
    assert drawn == {"sgd": ([0, 1, 2], [4, 2, 1]), "adam": ([0, 1], [3, 0.5])}
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Race", "n", "nats")
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["sgd", "adam"]


def test_curves_tells_thirty_apart(tmp_path, figures):
    plot.curves({str(i): [-1.0, i] for i in range(30)}, tmp_path / "race.png", steps=[5, 7], log=False)
    (axes,) = figures[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 30
    assert {tuple(line.get_xdata()) for line in axes.lines} == {(5, 7)}
    assert axes.get_yscale() == "linear"


def test_confusion_shades_by_row_and_writes_the_counts(tmp_path, figures):
    counts = torch.tensor([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    plot.confusion(counts, tmp_path / "confusion.png", labels=["a", "b", "c"], title="Confusion")
    (axes,) = figures[0].axes
    shares = [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]]
    assert axes.images[0].get_array().tolist() == shares
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "6",
        (1, 0): "2",
        (0, 2): "1",
        (2, 2): "3",
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Confusion", "taken for", "is")


def test_gradient_flow_draws_the_size_of_each_leaf(tmp_path, figures):
    grads = {"a": {"bias": torch.tensor([3.0, -4.0]), "weight": torch.full((2, 2), 0.01)}, "b": torch.zeros(3)}
    plot.gradient_flow(grads, tmp_path / "flow.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([12.5**0.5, 0.01, 0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a.bias", "a.weight", "b"]
    assert axes.get_xscale() == "log"


def test_gradient_flow_of_zeros_has_no_logarithm(tmp_path, figures):
    plot.gradient_flow({"w": torch.zeros(2)}, tmp_path / "flow.png")
    assert figures[0].axes[0].get_xscale() == "linear"


def test_scatter_draws_predictions_beside_the_line_of_agreement(tmp_path, figures):
    plot.scatter([1.0, 2.0, 4.0], torch.tensor([0.5, 2.5, 3.0]), tmp_path / "predictions.png")
    (axes,) = figures[0].axes
    line, points = axes.lines
    assert line.get_xydata().tolist() == [[0.5, 0.5], [4, 4]]
    assert points.get_xydata().tolist() == [[1, 0.5], [2, 2.5], [4, 3]]


def test_landscape_lies_along_its_axes(tmp_path, figures):
    """The contours of p -> p_0 are vertical: each band ends at two values of x, and reaches over all of y."""
    plot.landscape(lambda p: p[0], tmp_path / "plane.png", x_range=(-1, 3), y_range=(5, 6), log=False, resolution=11)
    (axes,) = figures[0].axes
    (bands,) = axes.collections
    assert (bands.zmin, bands.zmax) == (-1, 3)
    assert (axes.get_xlim(), axes.get_ylim()) == ((-1, 3), (5, 6))
    for band, low, high in zip(bands.get_paths(), bands.levels, bands.levels[1:]):
        ends = [*band.vertices.min(0), *band.vertices.max(0)]
        assert ends == pytest.approx([max(low, -1), 5, min(high, 3), 6])


def test_landscape_of_the_logarithm_is_finite_at_the_minimum(tmp_path, figures):
    fun = lambda p: p.square().sum() - 7
    plot.landscape(fun, tmp_path / "bowl.png", x_range=(-1, 1), y_range=(-1, 1), resolution=21)
    (bands,) = figures[0].axes[0].collections
    assert np.isfinite([bands.zmin, bands.zmax]).all()
    assert bands.zmax == pytest.approx(np.log(2), abs=1e-2)


def test_landscape_draws_paths_and_minimum(tmp_path, figures):
    fun, ways = lambda p: p.square().sum(), {"sgd": torch.tensor([[1.0, 2.0], [0.5, 0.0], [torch.nan, 1.0]])}
    options = {"x_range": (-2, 2), "y_range": (-2, 2), "resolution": 5, "minimum": (0.0, 0.0)}
    plot.landscape(fun, tmp_path / "bowl.png", paths=ways, **options)
    way, begin, end, star = figures[0].axes[0].lines
    assert way.get_label() == "sgd"
    assert way.get_xydata().tolist() == [[1, 2], [0.5, 0]]
    assert (begin.get_xydata().tolist(), end.get_xydata().tolist()) == ([[1, 2]], [[0.5, 0]])
    assert star.get_xydata().tolist() == [[0, 0]]


def test_plot_leaves_pyplot_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot.curves({"sgd": [3.0, 2.0]}, tmp_path / "loss.png")
    plot.confusion(torch.eye(2), tmp_path / "confusion.png")
    plot.landscape(lambda p: p[0], tmp_path / "plane.png", x_range=(0, 1), y_range=(0, 1), resolution=2)
    assert "matplotlib.pyplot" not in sys.modules


def plane(path, fun=lambda p: p[0], **options):
    return plot.landscape(fun, path, **{"x_range": (0, 1), "y_range": (0, 1), "resolution": 3, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: plot.image_grid(torch.zeros(2, 8, 8), p), r"images: expected shape \(n, c, h, w\), got \(2, 8, 8\)"),
        (lambda p: plot.image_grid(torch.zeros(2, 2, 8, 8), p), "expected the number of channels to be one of 1, 3"),
        (lambda p: plot.image_grid(torch.zeros(0, 1, 8, 8), p), "expected images > 0, got 0"),
        (lambda p: plot.image_grid(torch.full((1, 1, 2, 2), torch.nan), p), "images: expected no NaN, got one"),
        (lambda p: plot.image_grid(torch.zeros(5, 1, 2, 2), p, rows=2, columns=2), r"expected rows \* columns >= 5"),
        (lambda p: plot.image_grid(torch.zeros(5, 1, 2, 2), p, columns=0), "expected columns > 0, got 0"),
        (lambda p: plot.image_grid(torch.zeros(5, 1, 2, 2), p, rows=0), "expected rows > 0, got 0"),
        (lambda p: plot.image_grid(torch.zeros(5, 1, 2, 2), p, scale=0), "expected scale > 0, got 0"),
        (lambda p: plot.image_grid(torch.zeros(4, 1, 2, 2), p, row_labels=["a"]), "expected 2 row_labels, got 1"),
        (
            lambda p: plot.image_grid(torch.zeros(4, 1, 2, 2), p, value_range=(1, 1)),
            r"expected value_range \(low, high",
        ),
        (lambda p: plot.image_path(torch.zeros(5, 1, 2, 2), p), r"expected shape \(steps, n, c, h, w\)"),
        (lambda p: plot.image_path(torch.zeros(5, 1, 1, 2, 2), p, times=[1.0]), r"expected times \(5,\).*got \(1,\)"),
        (lambda p: plot.image_path(torch.zeros(5, 1, 1, 2, 2), p, columns=0), "image_path: expected columns > 0"),
        (lambda p: plot.curve([], p), "values: expected at least one and finite values > 0 for log=True"),
        (lambda p: plot.curve([1.0, torch.nan], p), "values: expected at least one and finite"),
        (lambda p: plot.curve([1.0, 0.0], p), "finite values > 0 for log=True"),
        (lambda p: plot.curve([1.0, 2.0], p, steps=[0]), r"curve: steps: expected shape \(n=2,\), got \(1,\)"),
        (lambda p: plot.curve([1.0, 2.0], p, window=0), "curve: expected window > 0, got 0"),
        (lambda p: plot.curves({}, p), "curves: expected values > 0, got 0"),
        (
            lambda p: plot.curves({"a": [1.0], "b": [0.0]}, p),
            "curves: 'b': expected at least one and finite values > 0",
        ),
        (
            lambda p: plot.curves({"a": [1.0]}, p, steps=[0, 1]),
            r"curves: 'a': steps: expected shape \(n=1,\), got \(2,\)",
        ),
        (lambda p: plot.confusion(torch.zeros(2, 3), p), r"confusion: counts: expected shape \(c, c\), got \(2, 3\)"),
        (lambda p: plot.confusion(torch.zeros(0, 0), p), "confusion: expected counts > 0, got 0"),
        (lambda p: plot.confusion(-torch.eye(2), p), "confusion: counts: expected counts >= 0, got -1"),
        (lambda p: plot.confusion(torch.eye(2), p, labels=["a"]), "confusion: expected 2 labels, got 1"),
        (lambda p: plot.gradient_flow({}, p), "gradient_flow: expected grads > 0, got 0"),
        (
            lambda p: plot.gradient_flow({"a": {"b": torch.tensor([torch.nan])}}, p),
            "gradient_flow: grads: 'a.b': expected at least one and finite values",
        ),
        (lambda p: plot.scatter([1.0], [1.0, 2.0], p), r"scatter: predicted: expected shape \(n=1,\), got \(2,\)"),
        (lambda p: plot.scatter([torch.inf], [1.0], p), "scatter: actual: expected at least one and finite values"),
        (
            lambda p: plane(p, x_range=(1, 1)),
            r"landscape: expected x_range \(low, high\) with low < high, got \(1, 1\)",
        ),
        (lambda p: plane(p, resolution=0), "landscape: expected resolution > 0, got 0"),
        (lambda p: plane(p, paths={"sgd": torch.zeros(3)}), r"landscape: paths: 'sgd': expected shape \(n, two=2\)"),
        (lambda p: plane(p, lambda x: 1 / x[0]), "landscape: expected fun to be finite on the grid"),
        (lambda p: plane(p, lambda x: x), r"landscape: values of fun: expected shape \(n=9,\), got \(9, 2\)"),
    ],
)
def test_plot_of_bad_arguments_is_an_error_and_writes_nothing(tmp_path, call, message):
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match=message):
        call(path)
    assert not path.exists()


def test_image_grid_of_integers_is_an_error(tmp_path):
    with pytest.raises(TypeError, match=r"image_grid: images: expected a floating-point tensor, got torch\.int64"):
        plot.image_grid(torch.zeros(1, 1, 2, 2, dtype=torch.int64), tmp_path / "grid.png")


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("PIL.Image", lambda p: plot.image_grid(torch.zeros(1, 1, 2, 2), p)),
        ("matplotlib.figure", lambda p: plot.curve([1.0], p)),
    ],
)
def test_plot_names_the_extra_that_it_needs(tmp_path, monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"plot: needs (PIL|matplotlib): pip install functorch_gen\[plot\]"):
        call(tmp_path / "picture.png")
