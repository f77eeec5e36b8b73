"""What keeps the host out of the way on an accelerator: block tables that stay there, and decode steps as CUDA graphs."""

from pagedkv.engine.device.block_tables import DeviceBlockTables
from pagedkv.engine.device.cuda_capture import CudaCapture
from pagedkv.engine.device.decode_graphs import DecodeGraphs, GraphCapture, bucket_sizes

__all__ = ["CudaCapture", "DecodeGraphs", "DeviceBlockTables", "GraphCapture", "bucket_sizes"]
