"""Jobs of a sweep: each has a folder named by what determines its result, so that what is done is not done again."""
