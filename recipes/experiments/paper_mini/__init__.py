"""The paper's grid in small: four data sets, five objectives, on tiny models that differ in skill and in wording."""
