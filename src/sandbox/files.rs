//! Closing files and the network, with Landlock.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, RestrictSelfAttr, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::Policy;

/// The newest version whose rights are handled. Rights that an older kernel does not know are left out.
const NEWEST: ABI = ABI::V10;

/// Why Landlock is not in effect.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this kernel has no Landlock, or it is not enabled (CONFIG_SECURITY_LANDLOCK, and `landlock` in lsm=)")]
    Missing,
    #[error(transparent)]
    Rules(#[from] RulesetError),
}

/// Allows nothing to be opened, created, run, connected to or bound, except as the policy says.
pub fn restrict(policy: &Policy) -> Result<(), Error> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    for folder in &policy.folders {
        rules = allow(rules, folder, AccessFs::RemoveFile.into())?;
    }
    if let Some(folder) = &policy.connects_in {
        rules = allow(rules, folder, AccessFs::ResolveUnix.into())?;
    }
    let status = rules.all_threads(true)?.restrict_self()?;
    match status.ruleset {
        RulesetStatus::NotEnforced => return Err(Error::Missing),
        // Nearly every kernel adds rights. The filter of system calls also refuses what these are about.
        RulesetStatus::PartiallyEnforced => log::info!("The file system is closed as far as {:?} can", status.landlock),
        RulesetStatus::FullyEnforced => log::info!("The file system is closed"),
    }
    Ok(())
}

/// Allows `rights` below a folder. If the folder does not exist, only its own rights are lost. The folder of a QMP
/// socket may be missing, since QEMU makes it later.
fn allow(rules: RulesetCreated, folder: &Path, rights: BitFlags<AccessFs>) -> Result<RulesetCreated, Error> {
    match PathFd::new(folder) {
        Ok(fd) => Ok(rules.add_rule(PathBeneath::new(fd, rights))?),
        Err(error) => {
            log::warn!("The sandbox keeps {} closed, since it cannot be opened now: {error}", folder.display());
            Ok(rules)
        }
    }
}
