# The boot sector of the guest that counts. What it does is said in counter.rs.

    .code16
    .globl _start

    .set    PIT_HZ, 1193182
    .set    DIVISOR, PIT_HZ / 50            # interrupts a second
    .set    ROUNDS_A_REPORT, 8
    .set    SCRATCH, 7                      # a 16550's register that keeps any byte
    .set    MTTY, 0x32534348                # device and vendor of mtty's cards
    .set    CONFIG_ADDRESS, 0xcf8
    .set    CONFIG_DATA, 0xfc               # the low byte; the high one is the address port's
    .set    DEBUG_PORT, 0xe9
    .set    ports, 0x8000                   # u16 for each card: its scratch register's port

_start:
    cli
    xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movw    $0x7c00, %sp
    cld
    # Nothing but the timer interrupts, and the interrupt controller ends each interrupt by itself: the count
    # hangs neither on a line that a device holds, nor on what the firmware left.
    movb    $0x11, %al                      # four bytes of set-up
    outb    %al, $0x20
    movb    $0x08, %al                      # vectors from 8
    outb    %al, $0x21
    movb    $0x04, %al                      # the other one at input 2
    outb    %al, $0x21
    movb    $0x03, %al                      # as a PC's, with automatic end of interrupt
    outb    %al, $0x21
    movb    $0xfe, %al
    outb    %al, $0x21
    movb    $0x34, %al                      # the first timer, both bytes, for ever again
    outb    %al, $0x43
    movb    $(DIVISOR & 0xff), %al
    outb    %al, $0x40
    movb    $(DIVISOR >> 8), %al
    outb    %al, $0x40

    movl    $0x80000000, %ebx               # the first function's first register
    movw    $ports, %di
find:
    movl    %ebx, %eax
    call    config_read
    cmpl    $MTTY, %eax
    jne     next_function
    leal    0x10(%ebx), %eax                # its first base address
    call    config_read
    andb    $0xfc, %al
    addw    $SCRATCH, %ax
    stosw
    incl    devices
next_function:
    addl    $0x100, %ebx
    cmpl    $0x80010000, %ebx               # bus 0 only
    jne     find
    movw    %di, end

    movw    $ports, %si
first:
    cmpw    end, %si
    je      round
    lodsw
    xchgw   %ax, %dx
    xorb    %al, %al
    outb    %al, %dx
    jmp     first

round:
    sti
    hlt
    movb    count, %bl                      # what every register must hold still
    incl    count
    movb    count, %bh                      # and what it holds next
    movw    $ports, %si
device:
    cmpw    end, %si
    je      devices_done
    lodsw
    xchgw   %ax, %dx
    inb     %dx, %al
    cmpb    %bl, %al
    je      write
    incl    errors
write:
    movb    %bh, %al
    outb    %al, %dx
    inb     %dx, %al
    cmpb    %bh, %al
    je      device
    incl    errors
    jmp     device
devices_done:
    testb   $(ROUNDS_A_REPORT - 1), count
    jnz     round

    movl    count, %eax
    movw    $count_end, %di
    call    decimal
    movl    errors, %eax
    movw    $errors_end, %di
    call    decimal
    movl    devices, %eax
    movw    $devices_end, %di
    call    decimal
    movw    $line, %si
    movw    $(line_end - line), %cx
    movw    $DEBUG_PORT, %dx
    rep outsb
    jmp     round

# eax := the configuration register at eax
config_read:
    movw    $CONFIG_ADDRESS, %dx
    outl    %eax, %dx
    movb    $CONFIG_DATA, %dl
    inl     %dx, %eax
    ret

# Writes eax in ten decimal digits, the last one before di.
decimal:
    movw    $10, %cx
    movl    $10, %ebp
digit:
    xorl    %edx, %edx
    divl    %ebp
    addb    $'0', %dl
    decw    %di
    movb    %dl, (%di)
    loop    digit
    ret

    .balign 4
count:   .long 0
errors:  .long 0
devices: .long 0
end:     .word 0

line:    .ascii "count=0000000000"
count_end:
    .ascii  " errors=0000000000"
errors_end:
    .ascii  " devices=0000000000"
devices_end:
    .ascii  "\n"
line_end:

    .org    510
    .word   0xaa55
