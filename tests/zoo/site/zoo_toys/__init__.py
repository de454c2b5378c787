"""A small plugin for tests: one image model, its reference adapter and its pipeline."""

from zoo_registry import hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models():
    return load_cards("zoo_toys")


@hookimpl
def zoo_adapters():
    return {"toy": "zoo_toys.models:ToyAdapter"}


@hookimpl
def zoo_pipelines():
    return {"toy-counting": "zoo_toys.models:Counting"}


@hookimpl
def zoo_validators():
    return {"toy-counting": "zoo_toys.models:count_right"}


@hookimpl
def zoo_commands():
    return {"toys": "zoo_toys.models:toys"}


@hookimpl
def zoo_demos():
    return [{"model": "toy_small.packed", "file": "demo/one.txt"}]
