"""A scored step, in the order of docs/algorithm.md.

in_run, pipeline            the objects that a training loop holds: InRunShapley, PipelineShapley
scored_step                 one optimizer step with values, from the direction to the audit
estimators, credit          what a value is: where gradients are taken, what later steps add
preparation, refresh        directions: taken, reduced, multiplied by the Jacobian; or those of an earlier step
passes, pipeline_passes     forwards and backwards for them that leave training alone
consumers                   what the taps feed: directions, and dots of rows
rows, row_watch             whose values these are, and whether layers keep rows apart
audit, step_checks          <d, G> from the optimizer's own gradient; what no audit sees of a step
result                      what a step came to
"""
