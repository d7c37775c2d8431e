"""The one loop, the inversion of a data set, and the work directory that both leave."""
