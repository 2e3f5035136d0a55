from llmq_kernels.layout import PackedWeight, pack
