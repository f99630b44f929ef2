"""Which pieces of work speed probes have done: times of one say nothing beside those of another."""

FORMER = 1  # without a product of matrices of the experts' kind; of recorders that did not say which
WITH_PRODUCT = 2
WITHOUT_PRODUCT = 3  # where several threads compute: a product would be theirs, and its time not one thread's
TODAY = (WITH_PRODUCT, WITHOUT_PRODUCT)
