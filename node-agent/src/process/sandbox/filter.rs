//! The system calls that a program in a sandbox may not make: those that reach into the kernel or other
//! processes and that no VMM needs. It holds the user and the namespaces of the sandbox as they are, and
//! lessens what of the kernel can be attacked; it is not what confines the program.
//!
//! execve(2) is possible, since the program itself is executed under the filter; a new process is not. So a
//! program can only become another one in the same sandbox.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::SandboxError;

/// Refused with EPERM whatever their arguments are.
const REFUSED: &[i64] = &[
    // File systems and roots.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_fanotify_init,
    // Namespaces.
    libc::SYS_unshare,
    libc::SYS_setns,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // The kernel.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_vhangup,
    // Large interfaces that have been attacked often.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_lookup_dcookie,
];

/// The same, where they exist.
#[cfg(target_arch = "x86_64")]
const REFUSED_HERE: &[i64] = &[
    libc::SYS_kexec_file_load,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[i64] = &[];

/// Does not exist, says the filter: its flags are in memory, where a filter cannot look. Libraries then use
/// clone(2).
const NOT_THERE: &[i64] = &[libc::SYS_clone3];

/// Families of sockets that it may make: AF_UNIX, AF_INET, AF_INET6. Others (AF_VSOCK, AF_ALG, AF_PACKET ...)
/// reach past its network namespace, or deep into the kernel.
const FAMILIES: [u64; 3] = [1, 2, 10];

/// Numbers of the x32 ABI (arch/x86/include/uapi/asm/unistd.h).
#[cfg(target_arch = "x86_64")]
const X32: u32 = 0x4000_0000;

/// Installs the filter in this thread, the only one.
pub(super) fn install() -> Result<(), SandboxError> {
    for program in [denied(), not_there()] {
        let program = program.map_err(|error| SandboxError::Filter(error.into()))?;
        seccompiler::apply_filter(&program).map_err(SandboxError::Filter)?;
    }
    Ok(())
}

fn condition(
    argument: u8,
    how: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)
}

fn denied() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().chain(REFUSED_HERE).map(|number| (*number, Vec::new())).collect();
    let thread = libc::CLONE_THREAD as u64;
    let own = [
        libc::CLONE_NEWNS,
        libc::CLONE_NEWCGROUP,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWNET,
    ];
    let mut clone = vec![SeccompRule::new(vec![condition(0, SeccompCmpOp::MaskedEq(thread), 0)?])?];
    for flag in own {
        let flag = flag as u32 as u64;
        clone.push(SeccompRule::new(vec![condition(0, SeccompCmpOp::MaskedEq(flag), flag)?])?);
    }
    rules.insert(libc::SYS_clone, clone);
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        let others = FAMILIES.iter().map(|family| condition(0, SeccompCmpOp::Ne, *family));
        rules.insert(call, vec![SeccompRule::new(others.collect::<Result<_, _>>()?)?]);
    }
    program(rules, libc::EPERM)
}

fn not_there() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = NOT_THERE.iter().map(|number| (*number, Vec::new())).collect();
    let program = program(rules, libc::ENOSYS)?;
    #[cfg(target_arch = "x86_64")]
    let program = without_x32(program);
    Ok(program)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: i32,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let here = TargetArch::try_from(std::env::consts::ARCH)?;
    // Calls of another architecture's ABI kill the process.
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), here)?.try_into()
}

/// Puts before a program that every call by the x32 ABI, whose numbers are others, is unknown (ENOSYS).
#[cfg(target_arch = "x86_64")]
fn without_x32(program: BpfProgram) -> BpfProgram {
    /// BPF_LD | BPF_W | BPF_ABS, of the call's number; BPF_JMP | BPF_JGE | BPF_K; BPF_RET | BPF_K.
    const LOAD: u16 = 0x20;
    const AT_LEAST: u16 = 0x35;
    const RETURN: u16 = 0x06;
    /// SECCOMP_RET_ERRNO.
    const ERRNO: u32 = 0x0005_0000;
    let unknown = [
        sock_filter { code: LOAD, jt: 0, jf: 0, k: 0 },
        sock_filter { code: AT_LEAST, jt: 0, jf: 1, k: X32 },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: ERRNO | libc::ENOSYS as u32 },
    ];
    unknown.into_iter().chain(program).collect()
}
