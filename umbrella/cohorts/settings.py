"""Settings of the phantom cohort."""

from pydantic import Field

from umbrella.base import Section


class CohortSettings(Section):
    """The phantom cohort, used when ``data.train`` is not set."""

    subjects: int = Field(120, ge=12, multiple_of=2)
    """Number of subjects. Whole families are split 60/20/20 into train, validation and test, at least four in each."""
    seed: int = Field(0, ge=0)
    """Seed of subjects, deformations, noise, splits and wording. The same seed gives the same bytes."""
    spacing: float = Field(4.0, gt=0, le=10)
    """Voxel size of the structural and diffusion volumes, in millimetres."""
    sex_scale: float = Field(0.08, ge=0, le=0.2)
    """Simulated effect of sex: heads of male subjects are larger by this fraction along each axis."""
    sex_region: float = Field(0.7, ge=0, le=0.8)
    """Simulated effect of sex: the right frontal region of male subjects is brighter by this fraction."""
    age_ventricle: float = Field(0.8, ge=0, le=1)
    """Simulated effect of age: the ventricles widen by this fraction from 20 to 80 years, less towards their ends."""
    age_region: float = Field(0.8, ge=0, le=0.8)
    """Simulated effect of age: the posterior half of the brain darkens by this fraction from 20 to 80 years."""
    size: float = Field(0.03, ge=0, le=0.05)
    """Standard deviation of the size of heads along each axis, as a fraction, independent of sex and age."""
    deformation: float = Field(1.0, ge=0, le=5)
    """Standard deviation of the smooth random deformation along each axis, in millimetres."""
    bias: float = Field(0.05, ge=0, le=0.5)
    """Standard deviation of the smooth multiplicative bias field, as a fraction."""
    noise: float = Field(0.03, ge=0, le=1)
    """Standard deviation of the noise, as a fraction of the intensity of the brightest tissue."""
    functional_subjects: int = Field(4, ge=0)
    """Number of subjects that also have a short 4D functional series."""
    diffusion_subjects: int = Field(4, ge=0)
    """Number of subjects that also have a 3D diffusion map."""
