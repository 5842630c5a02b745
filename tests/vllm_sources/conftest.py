"""Collected by `run` only: these tests need vLLM's Python files and the stand-ins, which the ordinary run has not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

collect_ignore_glob = [] if "VLLM_SOURCES" in os.environ else ["*"]

if not collect_ignore_glob:
    from engine import Engine
    from families import FAMILIES, Family

    @pytest.fixture(scope="session", autouse=True)
    def one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
        """vLLM's distributed state, for this process alone."""
        Engine.start(tmp_path_factory.mktemp("process") / "store")

    @pytest.fixture(scope="session")
    def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("models")

    @pytest.fixture(params=FAMILIES, ids=str)
    def family(request: pytest.FixtureRequest) -> Family:
        """Of all, or those that a test names with ``@pytest.mark.parametrize("family", some(...))``."""
        return request.param

    @pytest.fixture(params=["recorded", "rebuilt"])
    def forms(request: pytest.FixtureRequest) -> str:
        """Where the form of layers before processing is known from."""
        if request.param == "recorded":
            pytest.importorskip("vllm.model_executor.model_loader.reload", reason="this vLLM records nothing")
        return request.param

    @pytest.fixture(params=["alone", "rank0of2", "rank1of2"])
    def place(request: pytest.FixtureRequest) -> str:
        """Where in a tensor-parallel group an engine is."""
        return request.param

    @pytest.fixture
    def engine(place: str, family: Family, folders: Path) -> Iterator[Engine]:
        """A family's engine at its place; with "-experts" in the name, whole experts are divided among ranks."""
        rank, size = (0, 1) if place == "alone" else (int(place[4]), 2)
        with Engine(family, folders / family.name, rank, size, place.endswith("experts")) as made:
            yield made
