"""Settings of the embedded phantom cohort."""

from pydantic import Field

from umbrella.base import Section


class CohortSettings(Section):
    """The phantom cohort, used when ``data.train`` is not set."""

    subjects: int = Field(120, ge=12)
    """How many subjects are made; they are split 60/20/20 into train, validation and test, each at least four."""
    seed: int = Field(0, ge=0)
    """Seed of everything drawn: subjects, deformations, noise, splits and wording. Same seed, same bytes."""
    spacing: float = Field(4.0, gt=0, le=10)
    """Voxel size of the structural and diffusion volumes, in millimetres."""
    sex_scale: float = Field(0.08, ge=0, le=0.2)
    """Planted effect of sex: male heads are larger than female heads by this fraction, along each axis."""
    sex_region: float = Field(0.3, ge=0, le=0.8)
    """Planted effect of sex: the right frontal region of male subjects is brighter by this fraction."""
    age_ventricle: float = Field(0.8, ge=0, le=1)
    """Planted effect of age: from 20 to 80 years the ventricles widen by this fraction, less towards their ends."""
    deformation: float = Field(2.0, ge=0, le=5)
    """Standard deviation of the smooth random deformation along each axis, in millimetres."""
    bias: float = Field(0.05, ge=0, le=0.5)
    """Standard deviation of the smooth bias field that multiplies the intensities, as a fraction."""
    noise: float = Field(0.03, ge=0, le=1)
    """Standard deviation of the noise, as a fraction of the brightest tissue."""
    functional_subjects: int = Field(9, ge=0)
    """How many subjects, the first ones of each split, also get a short 4D functional series."""
    diffusion_subjects: int = Field(9, ge=0)
    """How many subjects, the first ones of each split, also get a 3D diffusion map."""
