"""The residual classifier against modules of torch.nn that have torchvision's names."""

import pytest
import torch
from test_cnn import TorchBlock, arguments, assert_close, normal
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.models import ResNet
from functorch_gen.transforms import eval_shape, grad, vmap


class TorchResNet(torch.nn.Module):
    """ResNet of basic blocks, as torchvision writes it."""

    def __init__(self, net: ResNet):
        super().__init__()
        big, c = net.stem == "imagenet", net.channels
        size, stride, padding = (7, 2, 3) if big else (3, 1, 1)
        self.conv1 = torch.nn.Conv2d(net.in_channels, c[0], size, stride, padding, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(c[0])
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1) if big else torch.nn.Identity()
        inputs = (c[0], *c)
        for i, count in enumerate(net.blocks):
            blocks = [
                TorchBlock(c[i] if j else inputs[i], c[i], 2 if i and not j else 1)  # the first of a stage halves
                for j in range(count)
            ]
            setattr(self, f"layer{i + 1}", torch.nn.Sequential(*blocks))
        self.stages = len(net.blocks)
        self.fc = torch.nn.Linear(c[-1], net.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


SMALL = {
    "imagenet": ResNet(2, 3, blocks=(1, 2), channels=(4, 6)),
    "cifar": ResNet(1, 5, blocks=(2, 1), channels=(3, 4), stem="cifar"),
    "one stage": ResNet(1, 2, blocks=(1,), channels=(3,), stem="cifar"),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SMALL)
def test_resnet_equals_the_torch_module(name, train):
    net = SMALL[name]
    params, state = arguments(net)
    module = TorchResNet(net).double().train(train)
    module.load_state_dict({**tree.names(params), **tree.names(state)})
    x = normal(1, 2, net.in_channels, 17, 13)
    y, new_state = net(params, state, x, train=train)
    assert_close(y, module(x))
    assert_close(tree.names(new_state), {name: b for name, b in module.named_buffers() if name in tree.names(state)})
    weight = normal(2, *y.shape)
    slopes = grad(lambda params: (weight * net(params, state, x, train=train)[0]).sum())(params)
    (weight * module(x)).sum().backward()
    for path, p in module.named_parameters():
        assert_close(tree.names(slopes)[path], p.grad, 1e-10)


def test_resnet_18_has_the_parameters_of_the_paper():
    """11.69 million: those of torchvision's resnet18, 11,689,512."""
    params = eval_shape(ResNet().init, random.key(0))
    assert sum(torch.Size(x.shape).numel() for x in tree.leaves(params)) == 11_689_512


def test_resnet_34_has_the_parameters_of_the_paper():
    """Those of torchvision's resnet34: 21,797,672."""
    params = eval_shape(ResNet(blocks=(3, 4, 6, 3)).init, random.key(0))
    assert sum(torch.Size(x.shape).numel() for x in tree.leaves(params)) == 21_797_672


def test_features_are_what_the_last_layer_reads():
    net = SMALL["cifar"]
    params, state = arguments(net)
    x = normal(1, 2, 1, 8, 8)
    features, new = net.features(params, state, x, train=True)
    y, expected = net(params, state, x, train=True)
    assert_close(features @ params["fc"]["weight"].mT + params["fc"]["bias"], y)
    assert_close(new, expected)


def test_resnet_takes_leading_axes():
    net = SMALL["imagenet"]
    params, state = arguments(net)
    x = normal(1, 2, 3, 2, 16, 16)
    y = net(params, state, x, train=False)[0]
    assert_close(y, vmap(lambda x: net(params, state, x, train=False)[0])(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 1)}, "ResNet: expected blocks with 4 sizes"),
        ({"stem": "big"}, "ResNet: expected stem to be one of 'imagenet', 'cifar'"),
        ({"num_classes": 0}, "ResNet: expected num_classes >= 1"),
    ],
    ids=["blocks", "stem", "classes"],
)
def test_resnet_refuses_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**options)
