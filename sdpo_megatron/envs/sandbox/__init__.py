"""Programs that a model wrote, run where they can do no harm. `choice.choose` says which way works on a machine."""
