//! What a program may not do: limits, capabilities, privileges, and the user that it runs as.

use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use super::error::step;
use super::{Sandbox, SandboxError};

/// More than any VMM needs, and less than would matter to the node.
const OPEN_FILES: u64 = 16_384;
/// A VMM has a thread for each vCPU and device queue, and some for its disks. Its user is its own, so nobody
/// else's count.
const THREADS: u64 = 4096;

fn limit(resource: Resource, most: u64) -> rustix::io::Result<()> {
    setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
}

/// Takes this thread, the only one, every right but those of the sandbox's user.
pub(super) fn give_up(sandbox: &Sandbox) -> Result<(), SandboxError> {
    let open = getrlimit(Resource::Nofile).maximum.map_or(OPEN_FILES, |most| most.min(OPEN_FILES));
    limit(Resource::Nofile, open).map_err(step("limit its open files (RLIMIT_NOFILE)"))?;
    limit(Resource::Nproc, THREADS).map_err(step("limit its threads (RLIMIT_NPROC)"))?;
    limit(Resource::Core, 0).map_err(step("forbid core dumps (RLIMIT_CORE)"))?;
    limit(Resource::Memlock, sandbox.locked_memory_bytes)
        .map_err(step("let it lock its memory (RLIMIT_MEMLOCK, which takes CAP_SYS_RESOURCE)"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    // The bounding set has only such as this kernel knows.
    for bit in 0..u64::BITS {
        let Some(capability) = CapabilitySet::from_bits(1 << bit) else { continue };
        if let Err(errno) = remove_capability_from_bounding_set(capability)
            && errno != rustix::io::Errno::INVAL
        {
            return Err(step("empty the bounding set of capabilities")(errno));
        }
    }
    clear_ambient_capability_set().map_err(step("empty the ambient set of capabilities"))?;
    let (user, group) = (Uid::from_raw(sandbox.user), Gid::from_raw(sandbox.user));
    set_thread_groups(&[]).map_err(step("leave all groups"))?;
    set_thread_res_gid(group, group, group).map_err(step("change to its group"))?;
    set_thread_res_uid(user, user, user).map_err(step("change to its user"))?;
    set_capabilities(None, none).map_err(step("give up all capabilities"))?;
    set_no_new_privs(true).map_err(step("give up new privileges"))?;
    let left = capabilities(None).map_err(step("read its capabilities"))?;
    if left != none {
        return Err(step("give up all capabilities")(std::io::Error::other("some are left")));
    }
    Ok(())
}
