import copy
import functools
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import spectral_norm, weight_norm
from torch.utils.data import Subset, TensorDataset

from trainguard.data.store import open_images
from trainguard.errors import ModelError
from trainguard.models import bare, copy_of, short_strides, working_copy
from trainguard.screening.relabeling import relabel


@pytest.fixture
def store(images, labels):
    return open_images(TensorDataset(images, labels))


def network(outputs=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, outputs), nn.BatchNorm1d(outputs))


def test_working_copy_shares_nothing_with_the_user_s_model(store):
    model = network()
    copied = working_copy(model, store)
    mine = {parameter.data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
    assert not mine & {parameter.data_ptr() for parameter in [*copied.parameters(), *copied.buffers()]}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert model.training and not copied.training


def test_working_copy_takes_a_function_a_class_and_names(store):
    assert isinstance(working_copy(network, store), nn.Sequential)
    for name in ("resnet10t", "squeezenet1_1"):  # timm's, torchvision's
        small = store if name == "resnet10t" else store_of_size(64)
        assert working_copy(name, small)(small.batch([0, 1])).shape == (2, 3)


def store_of_size(size):
    return open_images(TensorDataset(torch.rand(12, 3, size, size), torch.arange(12) % 3))


def test_a_transformer_by_name_gets_the_data_s_size():
    small = store_of_size(32)
    assert working_copy("vit_tiny_patch16_224", small)(small.batch([0])).shape == (1, 3)


def test_working_copy_runs_its_own_weights_where_accelerate_patched_forward(store):
    model = network()
    original = model.forward
    model._original_forward = original
    model.forward = lambda x: original(x) * 1.0
    copied = working_copy(model, store)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert (copied(store.batch([0, 1])) == 0).all()
    assert "forward" in vars(model)


def test_a_forward_of_the_model_s_own_is_kept_and_bound_to_the_copy(store):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model.forward = MethodType(lambda self, x: 2 * self[1](self[0](x)), model)
    model[1].forward = functools.partial(type(model[1]).forward, model[1])
    expected = model(store.batch([0, 1]))
    copied = copy_of(model)
    torch.testing.assert_close(copied(store.batch([0, 1])), expected)
    with torch.no_grad():
        model[1].weight.zero_()
    torch.testing.assert_close(copied(store.batch([0, 1])), expected)
    compiled = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    assert "forward" not in vars(copy_of(compiled))


def test_a_forward_that_would_call_the_user_s_model_from_a_copy_is_refused(store):
    def made():
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        inside = model[1].forward
        model[1].forward = lambda x: inside(x)

        def flat(x, again=False):  # holds on to itself alone
            return x.flatten(1) if again else flat(x, True)

        model[0].forward = flat
        return model

    with pytest.raises(ModelError, match="the forward of 1 was replaced by a function that calls the model itself"):
        copy_of(made())
    assert isinstance(copy_of(made), nn.Sequential)
    same = made()
    with pytest.raises(ModelError, match="the same Sequential every time"):
        copy_of(lambda: same)


def test_a_convolution_on_a_single_image_is_looked_at_as_well():
    layer = nn.Conv2d(3, 4, 3, 4, 1)
    with short_strides(layer):
        shape = layer(torch.rand(3, 2, 2)).shape
    assert layer(torch.rand(3, 2, 2)).shape == shape


def test_a_compiled_part_of_a_model_is_copied_without_its_compiler(store):
    class Wrapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(network(), backend="eager")
            self.more = nn.Sequential(torch.compile(nn.Linear(3, 3), backend="eager"))

        def forward(self, x):
            return self.more(self.net(x))

    model = Wrapping().eval()
    copied, x = working_copy(model, store), store.batch([0, 1])
    assert torch.equal(copied(x), model(x))
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in copied.parameters()}
    assert isinstance(copied.net, nn.Sequential) and isinstance(copied.more[0], nn.Linear)


def test_a_model_that_needs_its_hooks_asks_for_a_function(store):
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.seen = nn.Flatten(), nn.Linear(192, 3), None
            self.body.register_forward_hook(lambda _, __, found: setattr(self, "seen", found))

        def forward(self, x):
            self.body(x)
            return self.head(self.seen.float())

    with pytest.raises(ModelError, match="a copy has no forward hooks: pass a function that builds the model"):
        working_copy(Tapped(), store)
    assert working_copy(Tapped, store)(store.batch([0])).shape == (1, 3)


def test_working_copy_drops_hooks_but_not_those_that_make_weights(store):
    model = nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(192, 3)))
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model[1].register_forward_pre_hook(lambda *_: calls.append(1))
    copied = working_copy(model, store)
    copied(store.batch([0]))
    assert not calls
    assert [type(hook).__name__ for hook in copied[1]._forward_pre_hooks.values()] == ["SpectralNorm"]
    assert len(model[1]._forward_hooks) == 1


def test_old_style_weight_norm_asks_for_a_function(store):
    def build():
        return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(192, 3)))

    with pytest.raises(ModelError, match="pass a function that builds the model"):
        working_copy(build(), store)
    assert isinstance(working_copy(build, store), nn.Sequential)


def test_a_function_that_gives_the_same_model_which_cannot_be_copied_is_refused(store):
    model = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(192, 3)))
    model(torch.rand(1, 3, 8, 8))
    with pytest.raises(ModelError, match=r"gives the same Sequential every time.*build a new one"):
        working_copy(lambda: model, store)


def test_bare_takes_wrappers_off():
    model = network()
    assert bare(nn.DataParallel(model)) is model
    assert bare(torch.compile(nn.DataParallel(model))) is model


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise RuntimeError("no")


class Output(nn.Module):
    """Gives what it is told."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    "model, message",
    [
        (Uncopyable(), "Uncopyable cannot be copied .*: pass a function that builds the model"),
        (network(4), "the model has 4 outputs, the data set has 3 classes"),
        (network(2), "the model has 2 outputs, the data set has 3 classes"),
        (Output(lambda x: x.new_full((len(x), 3), float("nan"))), "NaN or infinite outputs .*pixel range"),
        (Output(lambda x: x), r"expected logits of shape \(4, 3\) from the model, got shape \(4, 3, 8, 8\)"),
        (Output(lambda x: {"y": x}), "from the model, got dict"),
        (nn.Linear(7, 3), r"cannot run on images of shape \(4, 3, 8, 8\) from the data set: .*mat1"),
        (lambda: 7, "got function that gives int"),
        (7, "expected a model, a function that builds one, or a timm name, got int"),
        ("resnet_of_my_own", "neither timm nor torchvision has a model 'resnet_of_my_own'"),
        ("inception_v3", "cannot (build|run)|model cannot"),
    ],
)
def test_models_that_cannot_be_used_are_refused(model, message, store):
    with pytest.raises(ModelError, match=message):
        working_copy(model, store)


@pytest.fixture
def alone():
    """A process group of this process only."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [fully_shard, FullyShardedDataParallel])
def test_a_sharded_model_asks_for_a_function(wrap, store, alone):
    mesh = {"mesh": init_device_mesh("cpu", (1,))} if wrap is fully_shard else {"device_id": torch.device("cpu")}
    with pytest.raises(ModelError, match=r"split among processes \(FSDP\).*pass a function that builds a fresh one"):
        working_copy(wrap(network(), **mesh), store)


def test_a_model_that_deepspeed_holds_asks_for_a_function(store):
    model = network()
    next(model.parameters()).ds_id = 0  # what ZeRO-3 puts on every parameter; its shape is then empty
    with pytest.raises(ModelError, match=r"split among processes \(DeepSpeed\)"):
        working_copy(model, store)


class WithLogits:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("made", [WithLogits, lambda logits: {"logits": logits}])
def test_outputs_with_logits_are_understood(made, store):
    class HuggingFaceLike(nn.Linear):
        def forward(self, pixel_values):
            return made(super().forward(pixel_values.flatten(1)))

    assert isinstance(working_copy(HuggingFaceLike(192, 3), store), HuggingFaceLike)


@pytest.mark.parametrize("kept", [lambda f: f, lambda f: [f], lambda f: {"f": functools.partial(f)}])
def test_a_function_that_a_module_keeps_must_not_call_the_original(kept):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.function = kept(lambda x: self.net(x))

    with pytest.raises(ModelError, match="Calls keeps a function in its 'function' that calls the model itself"):
        copy_of(Calls())
    first = Calls()
    assert isinstance(copy_of(Calls), Calls)  # built anew: its function is its own
    with pytest.raises(ModelError, match="gives the same Calls every time"):
        copy_of(lambda: first)


def test_relabel_is_the_argmax_whatever_the_batch_size(store, images):
    model = network().eval()
    index = torch.randperm(60)[:23].numpy()
    with torch.no_grad():
        expected = model(images[index]).argmax(1)
    for batch_size in (1, 10, 256):
        labels = relabel(model, store, index, given=store.labels[index], batch_size=batch_size)
        assert labels.tolist() == expected.tolist() and labels.dtype == "int64"


def test_a_model_with_fewer_outputs_than_labels_cannot_relabel(store):
    with pytest.raises(ModelError, match="2 outputs, the data set's labels go up to 2: what changes labels after"):
        relabel(network(2), store, np.array([0]), given=store.labels[:1])


def test_a_model_with_a_single_output_cannot_relabel(store):
    for model in (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 1)),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 1), Flat()),
    ):
        with pytest.raises(ModelError, match="relabelling needs one output for each class"):
            relabel(model, store, np.arange(3), given=np.zeros(3, np.int64))


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten()


def test_a_part_of_the_classes_asks_for_as_many_outputs_as_its_labels_need(images, labels):
    data = TensorDataset(images, labels)
    data.classes = [f"class {i}" for i in range(5)]
    part = open_images(Subset(data, range(30)))
    assert part.num_classes == 5
    for outputs in (3, 4, 5):
        working_copy(network(outputs), part)
    for outputs in (2, 6):
        with pytest.raises(ModelError, match=f"{outputs} outputs, the data set has 5 classes"):
            working_copy(network(outputs), part)


def test_relabel_restores_modes_and_buffers_also_when_the_model_fails(store):
    model = network()
    model[1].eval()
    buffers = copy.deepcopy(list(model.buffers()))
    relabel(model, store, store.readable, given=store.labels)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    failing = nn.Sequential(model, nn.Linear(7, 7))
    with pytest.raises(ModelError, match="cannot run on images of shape"):
        relabel(failing, store, store.readable, given=store.labels)
    assert failing.training and not model[1].training


def test_a_stride_stays_where_a_layer_is_used_on_several_sizes():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3, 2, 1)

        def forward(self, x):
            for _ in range(4):  # 8 pixels to 4, 2, 1, 1
                x = self.layer(input=x)
            return x

    net, x = Shared(), torch.rand(2, 1, 8, 8)
    with torch.no_grad(), short_strides(net):
        before = net(x)
    assert net.layer.stride == (2, 2) and torch.equal(net(x), before)


def test_relabel_keeps_the_given_label_where_the_model_gives_nan(store):
    model = Output(lambda x: torch.where(x[:, :1, 0, 0] > 0.5, float("nan"), torch.tensor([[0.0, 0.0, 9.0]])))
    labels = relabel(model, store, store.readable, given=store.labels)
    nan = (store.batch(store.readable)[:, 0, 0, 0] > 0.5).numpy()
    assert 0 < nan.sum() < 60
    assert (labels[nan] == store.labels[nan]).all() and (labels[~nan] == 2).all()


@pytest.mark.parametrize(
    ("layer", "side", "expected"),
    [
        (nn.Conv2d(3, 4, 3, 2, 1), 1, (1, 1)),
        (nn.Conv2d(3, 4, 3, 2, 1), 2, (2, 2)),
        (nn.Conv2d(3, 4, 7, 4, 3), 2, (2, 2)),
        (nn.Conv2d(3, 4, 7, 4, 3), 3, (3, 3)),
        (nn.Conv2d(3, 4, (3, 1), (4, 2), (1, 0)), 2, (2, 2)),
        (nn.Conv2d(3, 4, 3, 4, 3), 2, (4, 4)),  # the padding makes two of it
        (nn.Conv2d(3, 4, 3, padding="same"), 1, (1, 1)),
    ],
)
def test_strides_are_shortened_to_the_side_where_that_changes_nothing(layer, side, expected):
    net, x = nn.Sequential(copy.deepcopy(layer)), torch.rand(2, 3, side, side)
    before = net(x)
    with short_strides(net):
        net(x)
    assert net[0].stride == expected and torch.allclose(net(x), before, atol=1e-6) and not net[0]._forward_pre_hooks


def test_a_model_that_a_function_gives_keeps_its_hooks():
    def made():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        net.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 10,))
        return net

    x = torch.rand(2, 3, 2, 2)
    assert torch.equal(copy_of(made)(x), made()(x))
