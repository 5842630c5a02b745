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

    @pytest.fixture(params=["alone", "rank0of2", "rank1of2"])
    def place(request: pytest.FixtureRequest) -> str:
        """Where in a tensor-parallel group an engine is."""
        return request.param

    @pytest.fixture
    def engine(place: str, family: Family, folders: Path) -> Iterator[Engine]:
        """A family's engine at its place.

        With "-experts" in the place's name whole experts are divided among ranks; "stage" is one of a pipeline.
        """
        rank, size = (int(place[4]), 2) if place.startswith("rank") else (0, 1)
        stage = int(place[5]) if place.startswith("stage") else None
        with Engine(family, folders / family.name, rank, size, place.endswith("experts"), stage) as made:
            yield made
