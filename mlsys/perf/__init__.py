"""What a thing should cost: arithmetic about machines, models and messages. Nothing here needs torch to be imported.

`hardware`         what published machines can do, each figure with its source; this machine, measured.
`roofline`         the least time that some work needs on a machine, and which limit sets it.
`configs`          the shapes of transformers, and those of published models.
`transformer`      parameters, FLOPs, optimizer state and training time of a transformer of any shape.
`activations`      what its forward pass must keep for the backward pass, tensor by tensor.
`inference`        KV cache, weights and the time of a decoding step.
`collectives`      steps and bytes of all-reduce and its relatives under the α-β model.
`zero`             memory and communication of sharded data parallelism.
`tensor_parallel`  what splitting a layer over devices sends.
`pipeline`         bubble and memory of pipeline schedules.
`checkpointing`    what recomputing activations saves, and costs.
`scaling_laws`     loss against parameters and tokens, and the fits behind the laws.

FLOPs are counted with a multiply-add as two, sizes are bytes, times are seconds and rates are per second,
unless a name says otherwise.
"""
