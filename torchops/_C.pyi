TORCH_TARGET: str
TORCH_BUILT_AGAINST: str
CUDA_ARCHS: str
ISAS: str
COMPILER: str
BUILD_TYPE: str

def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
