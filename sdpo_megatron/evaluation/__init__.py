"""Numbers about a policy that compare: what is asked, how it is measured, and the ruler that is stored with it."""
