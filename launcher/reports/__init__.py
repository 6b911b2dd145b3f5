"""The drawing behind `manyforms report`: a run's folder as one page, without network or scripts."""
